from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from corolla.client.discovery import KnownServers, blocks_of
from corolla.errors import NetworkError, NoRoute, UnsupportedModel
from corolla.messages import Array, ForwardFrame, Pong, ResultFrame, WireMessage
from corolla.swarm.pings import RoundTrips
from corolla.swarm.probing import ProbeConfig, Probes
from corolla.swarm.records import ServerRecord
from tests.swarm.simulation import make_record

DEADLINE = 30.0


class Swarm:
    """A directory of `records`, and the probes of a client that the `honest` peers answer."""

    def __init__(self, *records: ServerRecord, honest: str = "") -> None:
        self.records, self.honest = list(records), honest
        self.error: Exception | None = None
        self.looks = 0
        self.probes = Probes(self._answer, ProbeConfig(newcomers=1000))
        self.known = KnownServers(self, "m", 12, look_every=0.02)

    def servers(self, model: str | None = None) -> list[ServerRecord]:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return self.records

    def measure(self) -> None:
        self.known.measure(RoundTrips(lambda peer, ping: None), self.probes)

    def peers(self) -> tuple[str, ...]:
        return self.known.route((), 1).peers

    def _answer(self, peer: str, message: WireMessage) -> None:
        if peer in self.honest and isinstance(message, ForwardFrame):
            self.probes.receive(peer, ResultFrame(message.call, Array("float32", (1, 64), memoryview(bytes(256)))))


def record(peer: str, start: int = 0, end: int = 12, **changes: object) -> ServerRecord:
    return make_record(peer, start, end, expires=time.time() + 1000, **changes)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_routes_go_over_servers_that_were_seen_at_work() -> None:
    swarm = Swarm(record("a"), record("liar", throughput=1e12), honest="a")
    assert swarm.peers() == ("liar",)
    swarm.measure()
    assert swarm.peers() == ("a",)
    assert [found.peer for found in swarm.known.proven] == ["a"]
    swarm.known.close()


def test_a_server_that_refuses_to_compute_makes_no_swarm_ready() -> None:
    swarm = Swarm(record("a"), record("dead"), honest="a")
    assert swarm.known.usable == swarm.records
    swarm.measure()
    swarm.probes.receive("dead", Pong(1, failing=True))
    assert [found.peer for found in swarm.known.usable] == ["a"]
    swarm.known.close()


def test_a_record_of_another_number_of_blocks_hides_nobody() -> None:
    swarm = Swarm(record("liar", 0, 1, blocks=1), record("a"), honest="a")
    assert swarm.peers() == ("a",)
    swarm.known.close()


def test_ten_thousand_forged_records_slow_no_route() -> None:
    forged = [record(f"forged{number}", throughput=1e12) for number in range(10_000)]
    swarm = Swarm(record("a", 0, 6), record("b", 6, 12), *forged, honest="ab")
    swarm.known.close()
    swarm.probes.ask(swarm.records[:2])
    swarm.known.measure(RoundTrips(lambda peer, ping: None), swarm.probes)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        assert swarm.peers() == ("a", "b")
        took.append(time.perf_counter() - began)
    assert min(took) < 0.5


def test_no_error_ends_the_look_outs() -> None:
    swarm = Swarm(record("a"))
    for error in (NetworkError("gone"), KeyError("never seen")):
        swarm.error, looks = error, swarm.looks
        until(lambda looks=looks: swarm.looks > looks)  # type: ignore[misc]
    swarm.error, swarm.records, looks = None, [record("b")], swarm.looks
    until(lambda: swarm.looks > looks and swarm.known.records == swarm.records)
    assert swarm.peers() == ("b",)
    swarm.known.close()


def test_a_swarm_that_never_served_the_model_says_so_and_a_cut_one_what_it_lacks() -> None:
    swarm = Swarm(record("a", 0, 6))
    with pytest.raises(NoRoute, match="6:12"):
        swarm.peers()
    swarm.known.close()


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_a_config_says_how_many_blocks_there_are(key: str) -> None:
    assert blocks_of({key: 30}) == 30
    with pytest.raises(UnsupportedModel, match="num_hidden_layers"):
        blocks_of({key: "many"})
