from __future__ import annotations

from collections.abc import Callable

from corolla.client.counters import ask_counters
from corolla.messages import AskCounters, Counters, WireMessage
from corolla.swarm.network import LocalHub, Network

DEADLINE = 30.0


def counting(network: Network, counts: dict[str, int]) -> Callable[[str, WireMessage], None]:
    def receive(sender: str, message: WireMessage) -> None:
        assert isinstance(message, AskCounters)
        network.send(sender, Counters(counts))

    return receive


def test_every_server_that_answers_is_told_of() -> None:
    hub = LocalHub()
    for name, count in (("a", 1), ("b", 2)):
        server = hub.join(name)
        server.listen(counting(server, {"steps": count}), lambda peer: None)
    assert ask_counters(hub.join("me"), ["a", "b", "gone"], DEADLINE) == {"a": {"steps": 1}, "b": {"steps": 2}}


def test_a_silent_server_is_waited_for_no_longer_than_asked() -> None:
    hub = LocalHub()
    hub.join("mute").listen(lambda sender, message: None, lambda peer: None)
    assert ask_counters(hub.join("me"), ["mute"], 0.05) == {}
    assert ask_counters(hub.join("other"), [], DEADLINE) == {}
