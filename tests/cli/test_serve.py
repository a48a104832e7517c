from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from corolla.cli.serve import join_line, until_told_to_end
from tests.models import tiny
from tests.swarm.harness import DEADLINE, Swarm, at_most

ADDRESSES = ["/ip4/127.0.0.1/tcp/4001/p2p/Qm1", "/ip4/192.0.2.7/tcp/4001/p2p/Qm1"]


def test_the_line_to_join_with_names_the_farthest_address_and_no_secret() -> None:
    assert join_line("smollm2", ADDRESSES, secret=False) == f"corolla serve smollm2 --peers {ADDRESSES[1]}"
    assert join_line("smollm2", ADDRESSES[:1], secret=True) == f"corolla serve smollm2 --peers {ADDRESSES[0]} --secret ..."
    assert shlex.split(join_line("my models/x; rm", ADDRESSES, secret=False))[2] == "my models/x; rm"


def test_the_first_signal_tells_and_the_second_hurries() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with until_told_to_end() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert (signals.told.is_set(), signals.again.is_set()) == (True, False)
        signal.raise_signal(signal.SIGINT)
        assert signals.again.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "peers: name a peer of the swarm with --peers, or start one with --new-swarm"),
        (["--new-swarm", "--peers", ADDRESSES[0]], "peers: name a peer"),
        (["--new-swarm", "--blocks", "12"], "blocks: '12' is no range; give START:END, as in 0:12"),
        (["--new-swarm", "--blocks", "4:2"], "blocks: 4:2 is no range"),
        (["--new-swarm", "--memory", "8"], "memory: '8' is no size; give a number and B, KB, MB, GB"),
    ],
)
def test_bad_input_is_one_line(corolla: Callable[..., Any], arguments: list[str], message: str) -> None:
    result = corolla("serve", "toy", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_an_unknown_wire_dtype_is_refused(corolla: Callable[..., Any]) -> None:
    result = corolla("serve", "toy", "--new-swarm", "--wire-dtype", "q4")
    assert result.exit_code == 2
    assert "q8" in result.stderr


@pytest.mark.parametrize("alone", [True, False], ids=["told", "told-with-its-children"])
def test_a_server_that_is_told_to_end_says_so_and_ends(tmp_path: Path, alone: bool) -> None:
    with Swarm(tiny.save("llama", tmp_path / "model"), tmp_path, secret="tulip") as swarm:
        (server,) = swarm.serve("0:4")
        server.wait_ready()
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.signal(signal.SIGTERM, alone=alone)  # a terminal's Ctrl-C and a service manager's end reach all its processes
        assert server.process.wait(DEADLINE) == 0
        assert not psutil.wait_procs(family, timeout=DEADLINE)[1]
        assert server.said.splitlines()[-1] == "done: it has left the swarm"
        assert "--secret ..." in server.said
        assert "tulip" not in server.said


def test_a_server_that_is_dead_or_told_twice_ends(tmp_path: Path) -> None:
    """One whose libp2p daemon is killed says so and fails; one whose DHT hangs does not wait for it when it is told to end again."""
    with Swarm(tiny.save("llama", tmp_path / "model"), tmp_path, "--dtype", "float32", "--threads", "1") as swarm:
        dead, hanging = swarm.serve("0:2", "2:4")
        swarm.wait_ready()
        family = psutil.Process(dead.process.pid).children(recursive=True)
        next(child for child in family if "p2pd" in child.name()).kill()
        (node, *_) = psutil.Process(hanging.process.pid).children()
        node.suspend()
        hanging.signal(signal.SIGTERM, alone=True)
        until(lambda: "draining" in hanging.said)
        hanging.signal(signal.SIGTERM, alone=True)
        began = time.monotonic()
        hanging.process.wait(DEADLINE)
        assert time.monotonic() - began < at_most(10.0)
        assert dead.process.wait(DEADLINE) != 0
        assert "error: this server is dead: " in dead.said
        assert dead.said.rstrip().endswith("start it again")
        dead.ended = hanging.ended = True


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
