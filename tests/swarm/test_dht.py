"""hivemind's node as a process of ours: it ends when it is told to, whatever state it is in, and stays in its swarm until then."""

from __future__ import annotations

import asyncio
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from corolla.messages import Ping
from tests.swarm.daemons import PATIENCE
from tests.swarm.harness import OVER_HIVEMIND
from tests.swarm.test_directory import record

# hivemind scripts a function as it is imported, which torch 2.13 calls deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from corolla.swarm.dht import Node
    from corolla.swarm.peer import PeerConfig, SwarmPeer

pytestmark = OVER_HIVEMIND


def joined(**settings: object) -> SwarmPeer:
    async def join() -> SwarmPeer:  # while an event loop runs, or hivemind makes one and leaves it
        return SwarmPeer(PeerConfig(stay_every=0.5, **settings))  # type: ignore[arg-type]

    return asyncio.run(join())


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes(peer: SwarmPeer) -> dict[str, psutil.Process]:
    node = psutil.Process(peer._dht.pid)
    daemon = next(child for child in node.children() if "p2pd" in child.name())
    return {"node": node, "daemon": daemon}


def test_a_node_that_hangs_is_ended_with_its_daemon() -> None:
    async def start() -> Node:
        return Node(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], shutdown_timeout=0.5)

    node = asyncio.run(start())
    process = psutil.Process(node.pid)
    family = [process, *process.children(recursive=True)]
    assert len(family) > 1
    process.send_signal(signal.SIGSTOP)
    node.end()
    assert not psutil.wait_procs(family[1:], timeout=10)[1]
    assert not node.is_alive()


def test_a_bootstrap_node_that_was_restarted_finds_its_swarm_and_newcomers_do(tmp_path: Path) -> None:
    identity = tmp_path / "key"
    bootstrap = joined(identity=identity)
    port = int(bootstrap.addresses[0].split("/")[4])
    address = bootstrap.addresses[:1]
    server = joined(initial_peers=address)
    server.publish(record(server.network.me, expires=time.time() + 20))
    processes(bootstrap)["daemon"].kill()
    until(lambda: bootstrap.failure is not None)
    bootstrap.close()
    server.publish(record(server.network.me, expires=time.time() + 20))  # the server forgets the node that does not answer
    bootstrap = joined(identity=identity, port=port)
    newcomer = joined(initial_peers=address, client_mode=True)
    until(lambda: [found.peer for found in newcomer.servers()] == [server.network.me])
    for peer in (newcomer, server, bootstrap):
        assert peer.failure is None
        peer.close()


def test_a_bootstrap_node_remembers_whom_it_met(tmp_path: Path) -> None:
    """Its peers joined through others, and do not know that it is back."""
    memory = tmp_path / "key.peers"
    other = joined()
    first = joined(initial_peers=other.addresses, identity=tmp_path / "key", memory=memory)
    until(memory.exists)
    first.close()
    other.publish(record(other.network.me, expires=time.time() + 20))
    again = joined(identity=tmp_path / "key", memory=memory)
    until(lambda: [found.peer for found in again.servers()] == [other.network.me])
    again.close()
    other.close()


@pytest.mark.parametrize("which", ["node", "daemon"])
def test_a_peer_whose_processes_die_says_so(which: str) -> None:
    peer = joined()
    assert peer.failure is None
    processes(peer)[which].kill()
    until(lambda: peer.failure is not None)
    peer.close()


def test_peers_meet_over_ipv6() -> None:
    server = joined(host="::1")
    assert all(address.startswith("/ip6/::1/tcp/") for address in server.addresses)
    client = joined(initial_peers=server.addresses, client_mode=True)
    heard: list[str] = []
    server.network.listen(lambda sender, message: heard.append(sender), heard.append)
    client.network.listen(lambda sender, message: None, lambda peer: None)
    client.network.send(server.network.me, Ping(1))
    until(lambda: heard == [client.network.me])
    for peer in (client, server):
        peer.close()
