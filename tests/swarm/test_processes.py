"""Real server processes over real hivemind: `corolla serve`, `status`, `bootstrap`, `up`, and a client process. Faults: test_faults."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from corolla.models.reference import Reference
from tests.models import tiny
from tests.swarm.client_process import PROMPT
from tests.swarm.harness import COROLLA, DEADLINE, Swarm

COUNT = 400  # tokens: the ring goes on by itself, and must not be through before the fault


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def swarm(directory: Path, tmp_path: Path) -> Iterator[Swarm]:
    with Swarm(directory, tmp_path, "--dtype", "float32", started=True) as swarm:
        yield swarm


def test_a_client_process_goes_on_token_for_token_when_a_server_dies_and_another_comes(swarm: Swarm, directory: Path) -> None:
    _, middle, last = swarm.serve("0:1", "1:3", "3:4")
    swarm.wait_ready()
    assert [(record["start"], record["end"]) for record in swarm.status()] == [(0, 1), (1, 3), (3, 4)]
    command = [sys.executable, str(Path(__file__).with_name("client_process.py")), str(directory), swarm.address, str(COUNT), "5"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "there\n"
        middle.kill()
        swarm.replace(middle)
        rest, log = client.communicate("\n", timeout=DEADLINE)
    finally:
        client.kill()
        client.communicate()
    assert "is left for" in log, "the answer was complete before the fault"
    assert [int(token) for token in rest.split()] == Reference(directory).greedy(PROMPT, COUNT)
    (head,) = [record for record in swarm.status("--counters") if record["end"] == 4]
    assert 0 < head["counters"]["drafts_kept"] < head["counters"]["drafted"]  # the answer has guesses of both kinds

    last.process.terminate()
    assert last.process.wait(DEADLINE) == 0
    assert 4 not in [record["end"] for record in swarm.status()]  # it has withdrawn its record


def test_servers_join_through_a_bootstrap_node_and_strangers_do_not(directory: Path, tmp_path: Path) -> None:
    with Swarm(directory, tmp_path, "--dtype", "float32", secret="tulip") as swarm:
        swarm.serve("0:4")
        swarm.wait_ready()
        assert [record["end"] for record in swarm.status("--secret", "tulip")] == [4]
        for options in (("--secret", "crocus"), ()):
            with pytest.raises(AssertionError, match="the same secret"):
                swarm.status(*options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_process_that_was_ended(directory: Path, tmp_path: Path, number: signal.Signals) -> None:
    with Swarm(directory, tmp_path, started=True) as swarm:
        node = swarm.bootstrap.wait_ready()
        family = psutil.Process(node.process.pid).children(recursive=True)
        assert len(family) >= 2  # hivemind's process and its daemon
        node.signal(number, alone=True)
        assert node.process.wait(DEADLINE) == (0 if number == signal.SIGTERM else -number)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive


def test_up_answers_and_leaves_no_process_behind(smollm2: Path) -> None:
    up = subprocess.Popen(
        [*COROLLA, "up", str(smollm2), "--chat", "--servers", "2", "--dtype", "float32", "--temperature", "0"],
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
