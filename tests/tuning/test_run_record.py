"""The record of a run: what is written is what is read, and it can go back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corolla.errors import TrainingError
from corolla.tuning.run_record import HeldOut, RunRecord, read_record


def record(directory: Path) -> RunRecord:
    made = RunRecord(directory / "tuning.json", {"batch": 8})
    for step in (1, 2, 3):
        made.point(step=step, loss=3.0 - step, learning_rate=0.01, seconds=0.5, tokens=100)
    made.update(evaluations=[HeldOut(2, 2.0, 50).fields, HeldOut(3, 1.0, 50).fields], base={"loss": 3.0, "perplexity": 20.0, "tokens": 50})
    return made


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = record(tmp_path)
    found = read_record(tmp_path)
    assert found is not None
    assert (found.curve, found.evaluations, found.settings, found.steps) == (made.curve, made.evaluations, {"batch": 8}, made.steps)
    stored = json.loads((tmp_path / "tuning.json").read_bytes())
    assert stored["perplexity"] == pytest.approx(2.718, abs=1e-3)
    assert stored["base_perplexity"] == 20.0
    assert {"corolla", "torch", "transformers", "python"} <= set(stored["versions"])
    assert read_record(tmp_path / "other") is None


def test_it_goes_back_to_a_step(tmp_path: Path) -> None:
    made = record(tmp_path)
    made.back_to(2)
    assert [entry["step"] for entry in made.curve] == [1, 2]
    assert [entry["step"] for entry in made.evaluations] == [2]
    assert (made.steps["done"], made.seconds) == (2, 1.0)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 9}', '{"version": 1}'])
def test_a_damaged_record_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "tuning.json").write_text(content)
    with pytest.raises(TrainingError, match=r"tuning\.json is"):
        read_record(tmp_path)


def test_a_huge_loss_has_a_perplexity_that_json_can_say() -> None:
    assert HeldOut(0, 1e6, 1).perplexity < float("inf")
