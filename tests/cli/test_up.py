from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
import toy

from tests.models import tiny

DEADLINE = 120.0  # seconds
COROLLA = [sys.executable, "-c", "from corolla.cli.main import app; app()"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that can be talked with."""
    directory = toy.make_directory(tmp_path_factory.mktemp("up") / "model", toy.byte_level())
    return tiny.save("llama", directory, vocab_size=400, eos_token_id=toy.END)


@contextmanager
def running_up(directory: Path, folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [*COROLLA, "up", str(directory), "--servers", "2", "--port", "0", *options]
    own = {**os.environ, "TMPDIR": str(folder), "XDG_DATA_HOME": str(folder / "data")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=own)
    with process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[bytes], count: int) -> list[psutil.Process]:
    """All processes below it, once there are so many."""
    deadline = time.monotonic() + DEADLINE
    parent = psutil.Process(process.pid)
    while len(family := parent.children(recursive=True)) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return family


# The first server alone; with hivemind's process and the daemon below it, and the second one; and with the conversation's own.
@pytest.mark.parametrize(("count", "number"), [(1, signal.SIGINT), (4, signal.SIGINT), (8, signal.SIGTERM)])
def test_a_signal_at_any_moment_leaves_nothing(directory: Path, tmp_path: Path, count: int, number: signal.Signals) -> None:
    with running_up(directory, tmp_path) as process:
        family = until(process, count)
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)  # an impatient user's
        assert process.wait(DEADLINE) in (130, 143), (tmp_path / "log").read_text()
        _, alive = psutil.wait_procs(family, timeout=DEADLINE)
        assert not alive, [each.cmdline() for each in alive]
    assert not list(tmp_path.glob("corolla-*"))


def test_a_server_that_does_not_start_is_named_with_its_log(directory: Path, tmp_path: Path) -> None:
    with running_up(directory, tmp_path, "--dtype", "float7") as process:
        family = until(process, 1)
        assert process.wait(DEADLINE) == 2
        _, alive = psutil.wait_procs(family, timeout=DEADLINE)
        assert not alive
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: the server of blocks 0:2 did not start: error: dtype: 'float7'")
    assert Path(last.rpartition("(")[2].rstrip(")")).read_text().endswith(last.partition("did not start: ")[2].rpartition(" (")[0] + "\n")


def test_a_server_that_is_killed_is_started_again_and_answers_go_on(directory: Path, tmp_path: Path) -> None:
    with running_up(directory, tmp_path, "--no-browser") as process:
        page = wait_for_page(process, tmp_path)
        servers = [each for each in psutil.Process(process.pid).children() if "serve" in each.cmdline()]
        assert len(servers) == 2
        [first] = [each for each in servers if "0:2" in each.cmdline()]  # whose address the others know
        first.kill()
        first.wait(DEADLINE)
        assert answered(page)
        assert "the server of blocks 0:2 ended by itself and is started again; its log says why: " in (tmp_path / "log").read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130


def wait_for_page(process: subprocess.Popen[bytes], folder: Path) -> str:
    deadline = time.monotonic() + DEADLINE
    while not (found := re.search(r"http://[\d.:]+", (folder / "log").read_text())):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found[0]


def answered(page: str) -> bool:
    """Whether there is an answer before the deadline, from a swarm that may be incomplete for a while."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        answer = httpx2.post(f"{page}/v1/completions", json={"prompt": "hello", "max_tokens": 4, "temperature": 0}, timeout=DEADLINE)
        if answer.status_code == 200:
            return True
        time.sleep(0.2)
    return False
