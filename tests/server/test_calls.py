"""Calls at a server: what is answered, what is refused, what is dropped."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, cast

import pytest
import torch

from corolla.engine.background_jobs import BackgroundJobs
from corolla.engine.budgets import Budgets
from corolla.engine.calls import backward, forward
from corolla.engine.counters import EngineCounters
from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.prompts import PromptStore
from corolla.messages import BackwardFrame, FailedFrame, ForwardFrame, Leaving, Reply, ResultFrame, WireMessage
from corolla.models.linear import PlainLinear
from corolla.models.span import SpanModel, load_span
from corolla.server.calls import CallsConfig, CallService
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.network import LocalHub
from corolla.types import PromptName, PromptPart, Span, Step
from tests.engine.stock import example, finish
from tests.models import tiny

LENGTHS = (9, 4)
SPAN = Span(1, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    return load_span(tiny.save("llama", tmp_path_factory.mktemp("llama")), Span(0, 3), dtype="float32")


class Loop:
    """An engine that computes when it is told to."""

    def __init__(self, model: SpanModel, budget: int) -> None:
        self.model = model
        self.prompts = PromptStore(model)
        self.budgets = Budgets(budget)
        self.counters = EngineCounters()
        self.beside = BackgroundJobs(self.counters)
        self.call = self.beside.add

    def run(self) -> None:
        while self.beside.advance(None):
            pass


class Server:
    """With a deep prompt of the client's, called p, if there is one."""

    def __init__(self, model: SpanModel, soft: torch.Tensor | None = None, budget: int = 2**32, **config: Any) -> None:
        self.loop = Loop(model, budget)
        if soft is not None:
            self.loop.prompts.put("client", PromptPart(PromptName("p", soft.shape[1], deep=True), SPAN, deep=soft))
        self.sent: list[tuple[str, WireMessage]] = []
        self.calls = CallService(
            cast(Engine, self.loop), lambda peer, message: self.sent.append((peer, message)), me="s", config=CallsConfig(**config)
        )

    def answer(self, frame: ForwardFrame | BackwardFrame) -> WireMessage:
        self.calls.receive("client", frame)
        self.loop.run()
        assert self.calls.waiting == 0
        ((peer, message),) = self.sent
        assert peer == "client"
        return message


def forward_frame(
    call: int = 7, span: Span = SPAN, lengths: tuple[int, ...] = LENGTHS, hidden: int = 64, value: float = 1.0
) -> ForwardFrame:
    return ForwardFrame(call, span.start, span.end, lengths, to_array(torch.full((sum(lengths), hidden), value), "float32"))


@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_and_gradients_come_back_in_the_dtype_they_came_in(model: SpanModel, prompts: int, dtype: Any) -> None:
    sequences, gradient = example(SPAN, LENGTHS, 64, prompts, dtype=dtype)
    name = PromptName("p", prompts, deep=True) if prompts else None
    array = to_array(sequences.hidden, dtype)
    result = Server(model, soft=sequences.prompts).answer(ForwardFrame(7, 1, 3, LENGTHS, array, name))
    assert isinstance(result, ResultFrame)
    assert (result.call, result.hidden.dtype) == (7, dtype)
    assert torch.equal(from_array(result.hidden), finish(forward(model, sequences)).to(getattr(torch, dtype)))
    (timing,) = result.timings
    assert timing.peer == "s"
    assert timing.compute > 0

    array = to_array(torch.cat([sequences.hidden, gradient]), dtype)
    result = Server(model, soft=sequences.prompts).answer(BackwardFrame(8, 1, 3, LENGTHS, array, name))
    assert isinstance(result, ResultFrame)
    expected = finish(backward(model, sequences, gradient))
    both = expected.hidden if expected.prompts is None else torch.cat([expected.hidden, expected.prompts.flatten(0, 1)])
    assert torch.equal(from_array(result.hidden), both.to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("frame", "kind", "word"),
    [
        (forward_frame(span=Span(2, 4)), "NetworkError", "holds blocks 0:3 and not 2:4"),
        (forward_frame(hidden=32), "InvalidSetting", "hidden: rows of 32"),
        (forward_frame(lengths=(60, 60)), "InvalidSetting", "lengths: 120 rows"),
        (forward_frame(lengths=(513,)), "PromptTooLong", "513"),
        (forward_frame(value=math.nan), "InvalidSetting", "hidden: .*NaN"),
        (forward_frame(value=math.inf), "InvalidSetting", "hidden: .*infinite"),
    ],
)
def test_what_cannot_be_computed_is_the_callers_fault(model: SpanModel, frame: ForwardFrame, kind: str, word: str) -> None:
    answer = Server(model, rows=1000 if kind == "PromptTooLong" else 100).answer(frame)
    assert isinstance(answer, FailedFrame)
    assert (answer.session, answer.generation, answer.kind, answer.peer) == ("7", 0, kind, "s")
    assert re.search(word, answer.message)


def test_gradients_that_overflow_are_the_callers_too(model: SpanModel) -> None:
    rows = torch.cat([torch.ones(13, 64), torch.full((13, 64), 3e38)])
    answer = Server(model).answer(BackwardFrame(7, 1, 3, LENGTHS, to_array(rows, "float32")))
    assert isinstance(answer, FailedFrame)
    assert answer.kind == "InvalidSetting"
    assert "overflows this server's float32" in answer.message


def test_a_fault_while_computing_is_the_servers(model: SpanModel) -> None:
    broken = replace(model.blocks[1], down=PlainLinear(torch.zeros(64, 7), None))
    blocks = (model.blocks[0], broken, model.blocks[2])
    span = SpanModel(model.arch, model.span, model.dtype, model.device, "plain", blocks, None, None, None, None, 0)
    answer = Server(span).answer(forward_frame())
    assert isinstance(answer, FailedFrame)
    assert answer.kind == "ServerFault"


def test_more_calls_than_may_wait_are_busy(model: SpanModel) -> None:
    server = Server(model, waiting=3, waiting_per_peer=2, retry_after=0.5)
    for call, peer in enumerate(("a", "a", "a", "b", "c")):
        server.calls.receive(peer, forward_frame(call))
    refused = [(peer, m.session, m.kind, m.retry_after) for peer, m in server.sent if isinstance(m, FailedFrame)]
    assert refused == [("a", "2", "Busy", 0.5), ("c", "4", "Busy", 0.5)]
    server.loop.run()
    assert [(peer, m.call) for peer, m in server.sent if isinstance(m, ResultFrame)] == [("a", 0), ("b", 3), ("a", 1)]
    server.calls.receive("c", forward_frame(5))
    assert server.calls.waiting == 1


def test_calls_of_more_bytes_than_may_wait_are_busy(model: SpanModel) -> None:
    server = Server(model, budget=8 * 4 * 40_000)  # 40,000 bytes of one client: more than one call of 40 rows or two
    for call, peer in enumerate(("a", "a", "a", "b")):
        server.calls.receive(peer, forward_frame(call, lengths=(40,)))
    assert [(peer, m.session) for peer, m in server.sent if isinstance(m, FailedFrame)] == [("a", "2")]
    server.loop.run()
    for call in (5, 6):
        server.calls.receive("a", forward_frame(call, lengths=(40,)))
    server.calls.lose("a")
    server.calls.receive("a", forward_frame(7, lengths=(500, 500)))  # one that holds nothing may have any one call
    server.loop.run()
    assert [m.call for peer, m in server.sent if isinstance(m, ResultFrame)] == [0, 3, 1, 7]


def test_probes_have_places_of_their_own(model: SpanModel) -> None:
    server = Server(model, waiting_per_peer=1, waiting=1)
    for call, rows in enumerate((9, 9, 1, 1)):
        server.calls.receive("a", forward_frame(call, lengths=(rows,)))
    assert [m.session for _, m in server.sent if isinstance(m, FailedFrame)] == ["1", "3"]


def test_calls_of_a_lost_peer_are_dropped(model: SpanModel) -> None:
    server = Server(model)
    for call, peer in enumerate(("a", "b", "a")):
        server.calls.receive(peer, forward_frame(call))
    server.loop.beside.advance(None)
    server.calls.lose("a")
    assert server.calls.waiting == 1
    server.loop.run()
    assert server.loop.counters.call_pieces == 1 + 1 + len(SPAN) + 1 + 1  # one of the call under way, and each one's end
    assert [peer for peer, _ in server.sent] == ["b"]


def test_a_session_decodes_while_a_call_is_computed(model: SpanModel) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=512, page_size=16))
    sent: list[WireMessage] = []
    CallService(engine, lambda peer, message: sent.append(message), me="s").receive("client", forward_frame(lengths=(200,) * 3))
    replies: list[Reply] = []
    engine.receive(Step("s", 0, [5, 6, 7]), replies.append)
    engine.run_once()
    assert replies
    assert not sent
    while not sent:
        assert engine.run_once()
    assert isinstance(sent[0], ResultFrame)


def test_a_training_step_along_two_servers(model: SpanModel) -> None:
    hub, inbox = LocalHub(), SimpleQueue[WireMessage]()
    engines = [Engine(model, EngineConfig(cache_tokens=512, page_size=16)) for _ in range(2)]
    config = SpanServerConfig(wire_dtype="float32")
    servers = [SpanServer(engine, hub.join(name), config) for engine, name in zip(engines, "ab", strict=True)]
    client = hub.join("client")
    client.listen(lambda sender, message: inbox.put(message), lambda peer: None)
    for engine in engines:
        engine.start()
    sequences, gradient = example(Span(0, 3), LENGTHS, 64)

    def ask(peer: str, frame: ForwardFrame | BackwardFrame) -> torch.Tensor:
        client.send(peer, frame)
        answer = inbox.get(timeout=10)
        assert isinstance(answer, ResultFrame)
        return from_array(answer.hidden)

    between = ask("a", ForwardFrame(0, 0, 2, LENGTHS, to_array(sequences.hidden, "float32")))
    back = ask("b", BackwardFrame(1, 2, 3, LENGTHS, to_array(torch.cat([between, gradient]), "float32")))
    back = ask("a", BackwardFrame(2, 0, 2, LENGTHS, to_array(torch.cat([sequences.hidden, back]), "float32")))
    torch.testing.assert_close(back, finish(backward(model, sequences, gradient)).hidden)
    for server in servers:
        server.close()


def test_calls_that_an_engine_leaves_undone_are_answered(model: SpanModel) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=512, page_size=16))
    sent: list[WireMessage] = []
    calls = CallService(engine, lambda peer, message: sent.append(message), me="s")
    for call in (1, 2):
        calls.receive("client", forward_frame(call))
    engine.start()
    engine.stop()
    calls.receive("client", forward_frame(3))
    assert len(sent) == 3
    assert calls.waiting == 0
    assert isinstance(sent[-1], FailedFrame)
    assert sent[-1].kind == "ServerFault"


def test_beside_sessions_calls_get_half_of_the_time(model: SpanModel) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=512, page_size=16, step_rows=2))

    def slow() -> Iterator[None]:
        for _ in range(50):
            time.sleep(0.3)
            yield

    engine.call(slow())
    engine.receive(Step("s", 0, [5, 6, 7] * 4), lambda reply: None)
    for _ in range(6):
        engine.run_once()
    assert engine.whereabouts("s", 0) == (12, 0)
    assert engine.counters.call_pieces_put_off > 0
    assert engine.counters.call_pieces + engine.counters.call_pieces_put_off == 6


def test_who_only_calls_is_told_too_that_a_server_leaves(model: SpanModel) -> None:
    hub, inbox = LocalHub(), SimpleQueue[WireMessage]()
    engine = Engine(model, EngineConfig(cache_tokens=512, page_size=16))
    server = SpanServer(engine, hub.join("a"), SpanServerConfig(wire_dtype="float32"))
    client = hub.join("client")
    client.listen(lambda sender, message: inbox.put(message), lambda peer: None)
    engine.start()
    client.send("a", forward_frame())
    assert isinstance(inbox.get(timeout=20), ResultFrame)
    server.leave()
    assert isinstance(inbox.get(timeout=20), Leaving)
    server.close()
