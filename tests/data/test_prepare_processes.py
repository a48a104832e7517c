"""`corolla prepare` in real processes: any number of workers, killed, on a full disk, two at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data.prepared import SLOW_START, command, contents, pairs, quiet, run, tokenizer

from corolla.data.dataset import PackedDataset
from corolla.data.description import tokenizer_sums
from corolla.data.layout import UNFINISHED
from corolla.data.output_lock import claimed
from corolla.data.prepare import PrepareSettings
from corolla.data.saving import SUMS
from corolla.data.sources import sources_of
from corolla.errors import DataError, StorageError

CHUNKS = 4
OPTIONS = ("--max-length", "128", "--dev", "0.1", "--categories", "auto", "--seed", "5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for `CHUNKS` chunks."""
    return pairs(tmp_path_factory.mktemp("source") / "chats.jsonl", CHUNKS * 4096, words=1)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, source: Path, model: Path) -> dict[str, bytes]:
    """What one process makes of it."""
    output = tmp_path_factory.mktemp("expected") / "out"
    run(source, output, model, dev=0.1, categories="auto", seed=5)
    return contents(output)


@pytest.mark.parametrize("workers", [2, 4])
def test_the_bytes_do_not_depend_on_the_workers(
    tmp_path: Path, source: Path, model: Path, expected: dict[str, bytes], workers: int
) -> None:
    run(source, tmp_path / "out", model, dev=0.1, categories="auto", seed=5, workers=workers)
    assert contents(tmp_path / "out") == expected


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX has it")
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("moment", ["articles/00000000.articles", "done/.train_1_of_1.hdf5.*"])
def test_a_killed_run_goes_on(tmp_path: Path, source: Path, model: Path, expected: dict[str, bytes], moment: str, workers: str) -> None:
    output = tmp_path / "out"
    begun = command(source, output, model, *OPTIONS, "--workers", workers)
    with subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        _wait_for(output / UNFINISHED, moment, process)
        process.send_signal(signal.SIGKILL)
    first = output / UNFINISHED / "articles" / "00000000.articles"
    made = first.stat().st_mtime_ns
    with pytest.raises(DataError, match="out is not finished: run the same `corolla prepare` again"):
        PackedDataset(output)
    times = set()

    def progress(stage: str, done: int, total: int | None) -> None:
        if stage == "writing":
            times.add(first.stat().st_mtime_ns)

    run(source, output, model, progress=progress, dev=0.1, categories="auto", seed=5)
    assert times <= {made}
    assert contents(output) == expected


@pytest.mark.parametrize("moved", [0, 1, 3, 100])
def test_killed_while_the_files_were_moved_to_their_places(
    tmp_path: Path, source: Path, model: Path, expected: dict[str, bytes], moved: int
) -> None:
    output, options = tmp_path / "out", {"dev": 0.1, "categories": "auto", "seed": 5}
    settings = PrepareSettings(inputs=(str(source),), tokenizer=model, **{"max_length": 128, **options})
    with claimed(output) as claim:
        claim.agree(settings.plan(sources_of([str(source)], quiet), tokenizer_sums(model)))
        for index, (name, content) in enumerate(sorted(expected.items(), key=lambda entry: (entry[0] == SUMS, entry[0]))):
            path = (output if index < moved else claim.done) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    run(source, output, model, **options)
    assert contents(output) == expected


def _wait_for(directory: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SLOW_START
    while not any(directory.glob(pattern)):
        assert process.poll() is None, f"the run ended before {pattern} was seen"
        assert time.monotonic() < deadline, f"{directory / pattern} did not come"
        time.sleep(0.0005)


@pytest.mark.skipif(sys.platform == "win32", reason="stops a process as POSIX has it")
def test_two_runs_into_one_directory(tmp_path: Path, source: Path, model: Path, expected: dict[str, bytes]) -> None:
    output = tmp_path / "out"
    with subprocess.Popen(command(source, output, model, *OPTIONS, "--workers", "1"), stdout=subprocess.DEVNULL) as process:
        _wait_for(output / UNFINISHED, "articles/00000000.articles", process)
        process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(DataError, match="out is being prepared by another run: wait for it, or name another directory"):
                run(source, output, model, dev=0.1, categories="auto", seed=5)
        finally:
            process.send_signal(signal.SIGCONT)
        assert process.wait(SLOW_START) == 0
    assert contents(output) == expected


def test_a_full_disk_and_on_when_there_is_room(small_disk: Path, source: Path, model: Path, expected: dict[str, bytes]) -> None:
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        run(source, small_disk / "out", model, dev=0.1, categories="auto", seed=5, workers=2)
    with pytest.raises(DataError, match="out is not finished"):
        PackedDataset(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True, timeout=60)
    run(source, small_disk / "out", model, dev=0.1, categories="auto", seed=5)
    assert contents(small_disk / "out") == expected


@pytest.mark.parametrize("room", [1_600_000, 2_000_000])
def test_a_disk_that_fills_up_later(tmp_path: Path, small_disk: Path, source: Path, model: Path, room: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={room}", small_disk], check=True, timeout=60)
    with pytest.raises(StorageError, match=r"cannot be (written|finished): "):
        run(source, small_disk / "out", model, dev=0.1)
    assert not (small_disk / "out" / "SHA256SUMS").exists()
