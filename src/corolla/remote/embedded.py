"""A whole model in this process as the one server of a network: the embedded default, without a swarm.

Messages are handed over by reference, to the engine that a server has too.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from corolla.engine.call_handler import CallHandler
from corolla.engine.engine import Engine
from corolla.errors import CorollaError, InvalidSetting, NetworkError, ServerFault
from corolla.messages import (
    Array,
    BackwardFrame,
    Close,
    ForwardFrame,
    Hop,
    Ping,
    Pong,
    PromptFrame,
    Reply,
    ResultFrame,
    StepFrame,
    WireDtype,
    WireMessage,
)
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.convert import failed_of, from_hidden, to_call, to_prompt_part, to_step
from corolla.swarm.network import OnLost, OnMessage
from corolla.swarm.routing import Quality, Route
from corolla.types import Failed, Hidden, Span

PEER = "embedded"


class EmbeddedNetwork:
    """A `Network` whose only other peer is `engine`, which holds every block; also the `SpanRouter` that leads there."""

    me = "client"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answering = CallHandler(engine.model, engine.prompts)
        self._on_message: OnMessage | None = None
        self._closed = False

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None) -> Route:
        """See `remote.servers.Router`. A fault of this process is no reason to avoid it: there is no other."""
        return Route((Hop(PEER, 0, self._engine.model.arch.blocks),), 0.0)

    def listen(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """See `Network.listen`."""
        self._on_message = on_message

    def send(self, peer: str, message: WireMessage) -> None:
        """See `Network.send`."""
        if self._closed:
            raise NetworkError("the model is closed: load it again")
        if isinstance(message, (ForwardFrame, BackwardFrame)):
            failed = partial(self._fail, str(message.call), 0)
            try:
                self._engine.call(self._steps(message), failed)
            except ServerFault as error:
                failed(error)
        elif isinstance(message, StepFrame):
            self._step(message)
        elif isinstance(message, PromptFrame):
            self._engine.prompts.put(self.me, to_prompt_part(message))
        elif isinstance(message, Close):
            self._engine.receive(message)
        elif isinstance(message, Ping) and self._engine.alive:
            self._answer(Pong(message.nonce))

    def send_all(self, messages: Sequence[tuple[str, WireMessage]]) -> None:
        """See `Network.send_all`."""
        for peer, message in messages:
            self.send(peer, message)

    @property
    def counts(self) -> Mapping[str, int]:
        """See `Network.counts`."""
        return {}

    def close(self) -> None:
        """Stop the engine."""
        self._closed = True
        self._engine.stop()

    def _answer(self, message: WireMessage) -> None:
        if self._on_message is not None and not self._closed:
            self._on_message(PEER, message)

    def _fail(self, session: str, generation: int, error: CorollaError) -> None:
        self._answer(failed_of(error, session, generation, peer=PEER))

    def _step(self, frame: StepFrame) -> None:
        assert frame.hidden is not None, "sessions of the PyTorch client are on hidden states"
        here = frame.route[frame.hop]
        try:
            step = replace(to_step(frame), span=Span(here.start, here.end), client=self.me)
            _check(step.payload, self._engine.model.arch.hidden)
            self._engine.receive(step, lambda reply: self._deliver(reply, frame.hidden.dtype))  # type: ignore[union-attr]
        except CorollaError as error:
            self._fail(frame.session, frame.generation, error)

    # On the engine's thread from here on.

    def _deliver(self, reply: Reply, dtype: WireDtype) -> None:
        if isinstance(reply, Hidden):
            reply = replace(reply, hidden=reply.hidden.clone())  # the engine may write its next rows there
            self._answer(from_hidden(reply, dtype))
        elif isinstance(reply, Failed):
            self._fail(reply.session, reply.generation, reply.error)
        else:
            self._answer(reply)

    def _steps(self, frame: ForwardFrame | BackwardFrame) -> Iterator[None]:
        try:
            result = yield from self._compute(frame)
        except CorollaError as error:
            self._fail(str(frame.call), 0, error)
        else:
            self._answer(ResultFrame(frame.call, result))

    def _compute(self, frame: ForwardFrame | BackwardFrame) -> Generator[None, None, Array]:
        received = from_array(frame.hidden)
        _check(received, self._engine.model.arch.hidden)
        result = yield from self._answering.answer(to_call(frame, self.me), received)
        return to_array(result, frame.hidden.dtype)


def _check(rows: object, width: int) -> None:
    """Raises `InvalidSetting` for rows that no block takes."""
    assert isinstance(rows, torch.Tensor)
    if rows.shape[1] != width:
        raise InvalidSetting("hidden", f"rows of {rows.shape[1]} values came, and the model's have {width}")
    if not bool(rows.isfinite().all()):
        raise InvalidSetting("hidden", "some of the values are NaN or infinite")
