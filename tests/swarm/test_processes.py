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
        joining = ["--peers", self.address] if self.address else ["--new-swarm"]
        return self.node("serve", str(self.directory), *joining, "--blocks", blocks, "--dtype", "float32")

    def node(self, *command: str) -> subprocess.Popen[str]:
        """A command that stays, once it is ready."""
        ready = self.folder / f"ready-{len(self.running)}"
        process = self.start([*COROLLA, *command, "--ready-file", str(ready)])
        deadline = time.monotonic() + DEADLINE
        while not ready.exists():
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.05)
        self.address = self.address or ready.read_text().split()[0]
        return process

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
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


COUNT = 400  # tokens: the ring goes on by itself, and must not be through before the fault


def three_servers(processes: Processes) -> subprocess.Popen[str]:
    """Servers of every block; gives the one in the middle."""
    processes.serve("0:1")
    middle = processes.serve("1:3")
    processes.serve("3:4")
    return middle


def answering(processes: Processes) -> subprocess.Popen[str]:
    """A client that has the first tokens of its answer."""
    script = Path(__file__).with_name("client_process.py")
    client = processes.start([sys.executable, str(script), str(processes.directory), processes.address, str(COUNT), "5"])
    assert client.stdout is not None
    assert client.stdout.readline() == "there\n"
    return client


def check_went_on_elsewhere(processes: Processes, client: subprocess.Popen[str]) -> None:
    rest, log = client.communicate("\n", timeout=DEADLINE)
    assert "is left for" in log, "the answer was complete before the fault"
    assert [int(token) for token in rest.split()] == Reference(processes.directory).greedy(PROMPT, COUNT)


def test_an_answer_survives_its_servers_death_token_for_token(processes: Processes) -> None:
    middle = three_servers(processes)
    assert [(record["start"], record["end"]) for record in processes.status()] == [(0, 1), (1, 3), (3, 4)]
    client = answering(processes)
    os.killpg(middle.pid, signal.SIGKILL)
    middle.wait(DEADLINE)
    processes.serve("1:3")
    check_went_on_elsewhere(processes, client)


def test_a_hung_server_is_as_dead_as_a_killed_one_and_its_late_words_change_nothing(processes: Processes) -> None:
    middle = three_servers(processes)
    client = answering(processes)
    os.kill(middle.pid, signal.SIGSTOP)
    processes.serve("1:3")
    time.sleep(3)  # longer than the client's patience: it has given the server up
    os.kill(middle.pid, signal.SIGCONT)
    check_went_on_elsewhere(processes, client)


def test_a_server_that_is_told_to_end_withdraws_its_record(processes: Processes) -> None:
    processes.serve("0:2")
    other = processes.serve("2:4")
    other.terminate()
    assert other.wait(DEADLINE) == 0
    assert [(record["start"], record["end"]) for record in processes.status()] == [(0, 2)]


def test_servers_join_through_a_bootstrap_node_and_strangers_do_not(processes: Processes) -> None:
    processes.node("bootstrap", "--secret", "tulip")
    processes.node("serve", str(processes.directory), "--peers", processes.address, "--blocks", "0:4", "--secret", "tulip")
    insider = [*COROLLA, "status", "--json", "--peers", processes.address, "--secret", "tulip"]
    done = subprocess.run(insider, stdout=subprocess.PIPE, check=True, timeout=DEADLINE)
    assert [record["end"] for record in json.loads(done.stdout)] == [4]
    assert processes.status() == []


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
