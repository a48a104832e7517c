"""A few seconds of what `make fuzz` does for minutes."""

from __future__ import annotations

from pathlib import Path

from tests.models import tiny
from tests.swarm import fuzz_messages
from tests.swarm.fuzz_frames import MESSAGES
from tests.swarm.fuzz_messages import fuzz
from tests.swarm.fuzz_strategies import Sent


def test_odd_messages_change_no_answer_and_leave_nothing(tmp_path: Path) -> None:
    report = fuzz(tiny.save("llama", tmp_path / "model"), 1000, failed=tmp_path / "failed.txt")
    assert report.messages.total() >= 1000
    assert len(report.messages) > 15
    assert report.tokens > 200
    assert report.verdict.wrong == []


def test_a_round_that_failed_is_read_as_it_was_written(tmp_path: Path) -> None:
    rounds = [[Sent("eve", "a", message), Sent("mallory", "s", message)] for message in MESSAGES]
    fuzz_messages.write(tmp_path / "failed.txt", rounds)
    assert fuzz_messages.read(tmp_path / "failed.txt") == rounds
