from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from corolla.cli.addresses import Address
from corolla.cli.findings import Finding, Verdict
from corolla.cli.reach import blocks, examine_swarm, ping, reach
from corolla.messages import Ping, Pong, WireMessage
from corolla.swarm.network import LocalHub, Network
from tests.cli.test_status import record
from tests.models import tiny
from tests.swarm.harness import Swarm

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, which hivemind uses where it is defined
    import hivemind  # noqa: F401

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
DEADLINE = 120.0


@contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[Address]:
    """A program at a free port that does something to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        yield Address(f"/ip4/127.0.0.1/tcp/{port}/p2p/{PEER}", "127.0.0.1", port, PEER)
        thread.join()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = reach(Address("", "127.0.0.1", port, PEER))
    assert found.verdict is Verdict.BROKEN
    assert "refuses" in found.value
    assert "is this machine itself" in found.advice


def test_a_host_that_has_no_address() -> None:
    found = reach(Address("", "nowhere.invalid", 1, PEER))
    assert (found.name, found.verdict) == ("host", Verdict.BROKEN)
    assert "nowhere.invalid has no address" in found.value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (lambda connection: connection.recv(100), "is no libp2p peer"),
        (lambda connection: (connection.recv(100), connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")), "is no libp2p peer"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "is no libp2p peer"),
        (lambda connection: (connection.recv(100), connection.recv(100)), "says nothing"),
        (lambda connection: connection.sendall(b"\x13/multistream/1.0.0\n"), "a libp2p peer listens"),
    ],
    ids=["hangs-up", "http", "ssh", "mute", "libp2p"],
)
def test_what_listens_is_told_by_its_greeting(answer: Callable[[socket.socket], object], value: str) -> None:
    with listening(answer) as address:
        assert value in reach(address, timeout=1.0).value


def test_addresses_that_are_none_end_it() -> None:
    (found,) = examine_swarm(["192.0.2.7:4001"], None)
    assert (found.name, found.value, found.verdict) == ("address", "192.0.2.7:4001", Verdict.BROKEN)
    assert "they look like /ip4/192.0.2.7/tcp/4001/p2p/" in found.advice


def test_servers_are_pinged() -> None:
    hub = LocalHub()
    server = hub.join("a")

    def answer(sender: str, message: WireMessage) -> None:
        assert isinstance(message, Ping)
        server.send(sender, Pong(message.nonce))

    server.listen(answer, lambda peer: None)
    me: Network = hub.join("me")
    answers = ping(me, ["a", "gone"])
    assert isinstance(answers["a"], float)
    assert answers["gone"] == "it cannot be dialled"


def test_blocks_that_nobody_holds_and_blocks_that_only_silent_servers_hold() -> None:
    records = [record(0, 10), record(10, 20), record(18, 28)]
    answering = {records[0].peer, records[2].peer}
    assert [found.value for found in blocks(records, answering)] == ["nobody holds blocks 28:30 of 30"]
    whole = [*records, record(28, 30)]
    (found,) = blocks(whole, {*answering, whole[-1].peer})
    assert (found.value, found.verdict) == ("no server that answers holds blocks 10:18 of 30", Verdict.BROKEN)
    assert [found.verdict for found in blocks(whole, {each.peer for each in whole})] == [Verdict.GOOD]


# hivemind forks beside threads (from Python 3.12 on that warns) and leaves streams to its daemon open when a dial fails.
over_hivemind = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:unclosed <StreamWriter:ResourceWarning")


def last(peers: list[str], secret: bytes | None = None) -> Finding:
    return list(examine_swarm(peers, secret))[-1]


@over_hivemind
def test_a_real_swarm_tells_why_it_cannot_be_reached(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path / "model")
    with Swarm(directory, tmp_path, secret="tulip") as swarm:
        assert "no server is announced" in last([swarm.address], b"tulip").value
        _, second = swarm.serve("0:2", "2:4")
        swarm.wait_ready()
        assert last([swarm.address]).value == "the swarm has a secret"
        assert last([swarm.address], b"rose").value == "the swarm's secret is another"
        assert last([swarm.address], b"tulip").value == "every one of its 4 blocks is held by a server that answers"

        other = f"{swarm.address.rpartition('/')[0]}/{PEER}"
        found = last([other], b"tulip")
        assert "another peer answers" in found.value
        assert swarm.address in found.advice

        second.signal(signal.SIGSTOP)
        *_, server, whole = examine_swarm([swarm.address], b"tulip")
        if "0:2" in server.value:  # on a slow machine the other's record has expired meanwhile
            assert whole.value == "nobody holds blocks 2:4 of 4"
        else:
            assert server.verdict is Verdict.WEAK
            assert whole.value == "no server that answers holds blocks 2:4 of 4"
        second.kill()


@over_hivemind
def test_a_clock_that_is_wrong_is_named(tmp_path: Path) -> None:
    slow = "import time; right = time.time; time.time = lambda: right() - 61; from corolla.cli.main import app; app()"
    ready = tmp_path / "ready"
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", slow, "bootstrap", "--ready-file", str(ready)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + DEADLINE
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found = last([ready.read_text().split()[0]])
        assert (found.name, found.value) == ("clock", "this machine's is 61 s ahead of the peer's")
    finally:
        process.terminate()
        process.wait(DEADLINE)
