from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.client.batch_output import JOURNAL, BatchOutput
from corolla.errors import Conflict, StorageError

JOB = {"model": "m", "settings": {"seed": 1}}


def results(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def test_results_come_in_the_order_of_the_requests(tmp_path: Path) -> None:
    with BatchOutput(tmp_path / "out", JOB) as output:
        for index in (2, 0, 1):
            output.write(index, {"id": str(index), "text": "é"})
        output.finish()
    assert [result["id"] for result in results(tmp_path / "out")] == ["0", "1", "2"]
    assert not (tmp_path / "out" / JOURNAL).exists()
    with BatchOutput(tmp_path / "out", JOB) as again:
        assert again.complete
        assert again.done(1)


@given(cut=st.integers(0, 200))
def test_whatever_a_kill_leaves_of_the_journal_nothing_is_lost_or_repeated(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("out")
    with BatchOutput(directory, JOB) as output:
        for index in range(4):
            output.write(index, {"id": str(index), "text": "line"})
    whole = (directory / JOURNAL).read_bytes()
    (directory / JOURNAL).write_bytes(whole[:cut])
    with BatchOutput(directory, JOB) as output:
        done = [index for index in range(4) if output.done(index)]
        assert done == list(range(whole[:cut].count(b"\n")))
        for index in range(4):
            if not output.done(index):
                output.write(index, {"id": str(index), "text": "line"})
        output.finish()
    assert [result["id"] for result in results(directory)] == ["0", "1", "2", "3"]


def test_what_failed_for_want_of_servers_is_asked_again(tmp_path: Path) -> None:
    with BatchOutput(tmp_path, JOB) as output:
        output.write(0, {"id": "0", "text": "fine"})
        output.write(1, {"id": "1", "error": {"type": "NoRoute", "message": ""}, "retry": True})
        output.finish()
        assert output.to_retry == 1
    assert "retry" not in results(tmp_path)[1]
    with BatchOutput(tmp_path, JOB) as output:
        assert (output.complete, output.done(0), output.done(1)) == (False, True, False)
        output.write(1, {"id": "1", "text": "now"})
        output.finish()
    assert results(tmp_path)[1] == {"id": "1", "text": "now"}


def test_another_job_is_not_mixed_in(tmp_path: Path) -> None:
    BatchOutput(tmp_path, JOB).__exit__(None, None, None)
    with pytest.raises(Conflict, match=r"another job's results \(model differ\)"):
        BatchOutput(tmp_path, {**JOB, "model": "n"})


def test_two_processes_do_not_write_into_one_directory(tmp_path: Path) -> None:
    with BatchOutput(tmp_path, JOB), pytest.raises(Conflict, match="another process"):
        BatchOutput(tmp_path, JOB)


def test_results_of_an_unknown_job_stay(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(Conflict, match=r"no job\.json"):
        BatchOutput(tmp_path, JOB)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        BatchOutput(tmp_path / "file" / "out", JOB)
