"""Real server processes over real hivemind: `corolla serve`, a client, a death, a drain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from corolla.models.reference import Reference
from tests.models import tiny
from tests.swarm.client_process import PROMPT

DEADLINE = 120.0  # seconds for a process to start or to end on a loaded machine
COROLLA = [sys.executable, "-c", "from corolla.cli.main import app; app()"]


class Processes:
    """Server processes of one model; all of them and their daemons end with the test."""

    def __init__(self, directory: Path, folder: Path) -> None:
        self.directory, self.folder = directory, folder
        self.running: list[subprocess.Popen[str]] = []
        self.address = ""

    def serve(self, blocks: str) -> subprocess.Popen[str]:
        ready = self.folder / f"ready-{len(self.running)}"
        joining = ["--peers", self.address] if self.address else ["--new-swarm"]
        process = self.start(
            [*COROLLA, "serve", str(self.directory), *joining, "--blocks", blocks, "--dtype", "float32", "--ready-file", str(ready)]
        )
        deadline = time.monotonic() + DEADLINE
        while not ready.exists():
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.05)
        self.address = self.address or ready.read_text().split()[0]
        return process

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.running.append(process)
        return process

    def status(self) -> list[dict[str, object]]:
        done = subprocess.run(
            [*COROLLA, "status", "--json", "--peers", self.address], stdout=subprocess.PIPE, check=True, timeout=DEADLINE, text=True
        )
        records: list[dict[str, object]] = json.loads(done.stdout)
        return records

    def end(self) -> None:
        for process in self.running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tiny.save("llama", tmp_path / "model"), tmp_path)
    yield processes
    processes.end()


def test_an_answer_survives_its_servers_death_token_for_token(processes: Processes) -> None:
    processes.serve("0:1")
    middle = processes.serve("1:3")
    processes.serve("3:4")
    assert [(record["start"], record["end"]) for record in processes.status()] == [(0, 1), (1, 3), (3, 4)]
    script = Path(__file__).with_name("client_process.py")
    client = processes.start([sys.executable, str(script), str(processes.directory), processes.address, "40", "15"])
    assert client.stdout is not None
    assert client.stdout.readline() == "there\n"
    os.killpg(middle.pid, signal.SIGKILL)
    middle.wait(DEADLINE)
    processes.serve("1:3")
    rest, _ = client.communicate("\n", timeout=DEADLINE)
    assert [int(token) for token in rest.split()] == Reference(processes.directory).greedy(PROMPT, 40)


def test_a_server_that_is_told_to_end_withdraws_its_record(processes: Processes) -> None:
    processes.serve("0:2")
    other = processes.serve("2:4")
    other.terminate()
    assert other.wait(DEADLINE) == 0
    assert [(record["start"], record["end"]) for record in processes.status()] == [(0, 2)]


def test_up_answers_and_leaves_no_process_behind(smollm2: Path) -> None:
    up = subprocess.Popen(
        [*COROLLA, "up", str(smollm2), "--servers", "2", "--dtype", "float32", "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    parent = psutil.Process(up.pid)
    assert up.stdin is not None
    assert up.stdout is not None
    up.stdin.write("What is the capital of France?\n")
    up.stdin.flush()
    assert "Paris" in up.stdout.readline()
    family = parent.children(recursive=True)
    assert len(family) >= 4  # two servers and their daemons
    up.communicate(timeout=DEADLINE)
    assert up.returncode == 0
    gone, alive = psutil.wait_procs(family, timeout=DEADLINE)
    assert not alive, [process.cmdline() for process in alive]
    assert len(gone) == len(family)
