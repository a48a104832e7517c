from __future__ import annotations

import dataclasses
import queue
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from corolla.engine.engine import EngineConfig
from corolla.errors import AdapterError, InvalidSetting, NetworkError
from corolla.messages import (
    Array,
    AskCounters,
    Counters,
    FailedFrame,
    ForwardFrame,
    HiddenFrame,
    Hop,
    Leaving,
    Ping,
    Pong,
    StepFrame,
    WireMessage,
)
from corolla.models.adapters import load_adapter
from corolla.models.checkpoint import read_config
from corolla.models.families import architecture
from corolla.server.span_manager import Offer, OfferedAdapter, SpanManager
from corolla.swarm.network import LocalHub
from corolla.swarm.probing import Probes
from corolla.types import Span
from tests.models import lora, tiny

TIMEOUT = 10.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


class Client:
    """Somebody who talks to the server, and what came back."""

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        self.network = hub.join("client")
        self.came: queue.SimpleQueue[WireMessage] = queue.SimpleQueue()
        self.network.listen(lambda sender, message: self.came.put(message), lambda peer: None)

    def ask(self, message: WireMessage) -> WireMessage:
        self.network.send("server", message)
        return self.came.get(timeout=TIMEOUT)


def step(start: int, end: int) -> StepFrame:
    """Three rows of hidden states through blocks that one server holds."""
    hidden = Array("float32", (3, 64), memoryview(bytes(3 * 64 * 4)))
    route = (Hop("server", start, end),)
    return StepFrame(f"to {end}", 0, 0, (), hidden=hidden, route=route, client="client", output="hidden")


@pytest.fixture
def client() -> Client:
    return Client(LocalHub())


@pytest.fixture
def holder(client: Client, directory: Path) -> Iterator[SpanManager]:
    offer = Offer(
        directory=directory,
        checkpoint="c",
        dtype="float32",
        weights="plain",
        device="cpu",
        wire_dtype="float32",
        engine=EngineConfig(cache_tokens=256),
    )
    network = client.hub.join("server")
    holder = SpanManager(network, offer, Probes(network.send))
    yield holder
    holder.let_go()


def test_before_a_span_is_loaded_it_answers_that_there_is_none(client: Client, holder: SpanManager) -> None:
    assert holder.held is None
    assert client.ask(Ping(7)) == Pong(7)
    assert client.ask(AskCounters()) == Counters({})
    refused = client.ask(step(0, 2))
    assert isinstance(refused, FailedFrame)
    assert refused.kind == "NetworkError"  # no fault of the caller: tried elsewhere
    call = client.ask(ForwardFrame(3, 0, 2, (3,), Array("float32", (3, 64), memoryview(bytes(3 * 64 * 4)))))
    assert isinstance(call, FailedFrame)
    assert call.session == "3"


def test_one_span_after_the_other_is_served(client: Client, holder: SpanManager) -> None:
    told: list[tuple[int, int]] = []
    held = holder.load(Span(0, 2), lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert held.meter.throughput > 0
    assert isinstance(client.ask(step(0, 2)), HiddenFrame)
    holder.let_go()
    assert isinstance(client.ask(step(0, 2)), FailedFrame)
    assert holder.load(Span(2, 4)).span == Span(2, 4)
    assert isinstance(client.ask(step(2, 4)), HiddenFrame)


def test_adapters_come_along_to_every_span_while_they_are_what_they_were(
    client: Client, holder: SpanManager, directory: Path, tmp_path: Path
) -> None:
    arch = architecture(read_config(directory))
    offered = OfferedAdapter("poet", lora.save(directory, tmp_path), load_adapter(tmp_path, arch).digest)
    network = client.hub.join("another")
    taking = SpanManager(network, dataclasses.replace(holder._offer, adapters=(offered,)), Probes(network.send))
    for span in (Span(0, 2), Span(2, 4)):
        assert taking.load(span).engine.adapters.find(offered.digest, span) is not None
        taking.let_go()
    lora.save(directory, tmp_path, seed=1)
    with pytest.raises(AdapterError, match="another adapter than when this server began"):
        taking.load(Span(0, 2))
    assert taking.held is None


def test_what_is_let_go_of_is_freed(holder: SpanManager) -> None:
    model = weakref.ref(holder.load(Span(0, 2)).engine.model)
    holder.let_go()
    assert model() is None


def test_a_span_that_cannot_be_loaded_leaves_nothing_held(client: Client, holder: SpanManager) -> None:
    with pytest.raises(InvalidSetting, match="blocks"):
        holder.load(Span(3, 9))
    assert holder.held is None
    assert client.ask(Ping(7)) == Pong(7)


def test_sessions_are_asked_to_leave_and_may_stay(client: Client, holder: SpanManager) -> None:
    holder.drain(draining=True)  # nothing is held, so nobody is asked
    holder.load(Span(0, 2))
    assert isinstance(client.ask(step(0, 2)), HiddenFrame)
    holder.drain(draining=True)
    assert client.came.get(timeout=TIMEOUT) == Leaving()
    assert isinstance(client.ask(replace(step(0, 2), session="new")), FailedFrame)
    holder.drain(draining=False)
    assert isinstance(client.ask(replace(step(0, 2), session="new")), HiddenFrame)


def test_a_server_that_leaves_loads_nothing_more(holder: SpanManager) -> None:
    def leave(done: int, total: int) -> None:
        assert done == 1, "it went on loading"
        holder.leave_for_good()

    with pytest.raises(NetworkError, match="leaving"):
        holder.load(Span(0, 4), leave)
    assert holder.held is None
