"""What happened at servers: each is asked for its counters."""

from __future__ import annotations

import threading

from corolla.messages import AskCounters, Counters, WireMessage
from corolla.swarm.network import Network


def ask_counters(network: Network, servers: list[str], timeout: float) -> dict[str, dict[str, int]]:
    """The counters of each of the `servers` (peer ids) that answers within `timeout` seconds.

    It listens on `network` from now on. Raises `NetworkError` when that is closed.
    """
    asked = set(servers)
    silent = set(servers)
    counters: dict[str, dict[str, int]] = {}
    done = threading.Event()
    lock = threading.Lock()

    def settle(peer: str, counts: dict[str, int] | None) -> None:
        with lock:
            if counts is not None and peer in asked:
                counters.setdefault(peer, counts)
            silent.discard(peer)
            if not silent:
                done.set()

    def receive(sender: str, message: WireMessage) -> None:
        if isinstance(message, Counters):
            settle(sender, dict(message.counts))

    network.listen(receive, lambda peer: settle(peer, None))
    for server in servers:
        network.send(server, AskCounters())
    if servers:
        done.wait(timeout)
    with lock:
        return dict(counters)
