"""The span that a server holds: loaded, served, and exchanged for another one while its place in the swarm stays."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.parts import EngineParts
from corolla.engine.threads import GoOn, on_passing_thread
from corolla.errors import AdapterError, NetworkError
from corolla.messages import AskCounters, BackwardFrame, Counters, ForwardFrame, Ping, Pong, StepFrame, WireDtype, WireMessage
from corolla.models.adapters import load_adapter
from corolla.models.linear import WeightFormat
from corolla.models.span import load_span
from corolla.server.measuring import Meter, measure_throughput
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm.convert import failed_of
from corolla.swarm.network import Network
from corolla.swarm.probing import Probes
from corolla.swarm.routing import Quality
from corolla.types import Span

log = logging.getLogger(__name__)
Report = Callable[[int, int], None]
"""Called with (blocks loaded, blocks in all)."""


@dataclass(frozen=True, slots=True)
class OfferedAdapter:
    """A LoRA adapter by its directory and the digest that it had when the server began."""

    name: str
    directory: Path
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What stays the same in a server's life: which model it serves, and how it computes."""

    directory: Path
    checkpoint: str  # see `Checkpoint.digest`
    dtype: str
    weights: WeightFormat
    device: str
    wire_dtype: WireDtype
    engine: EngineConfig
    parts: EngineParts = field(default_factory=EngineParts)
    adapters: tuple[OfferedAdapter, ...] = ()

    @property
    def quality(self) -> Quality:
        return Quality(self.dtype, self.weights, self.checkpoint)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A span that is loaded and served."""

    engine: Engine
    server: SpanServer
    meter: Meter

    @property
    def span(self) -> Span:
        return self.engine.model.span


class SpanManager:
    """Holds one span at a time on `network`; before the first and between two of them it answers that it holds none.

    `load` and `let_go` are for one thread at a time, the others for any.
    """

    def __init__(self, network: Network, offer: Offer, probes: Probes) -> None:
        self._network, self._offer, self._probes = network, offer, probes
        self._lock = threading.Lock()
        self._leaving_for_good = threading.Event()
        self._held: Held | None = None
        network.listen(self._answer_empty, probes.forget)

    @property
    def held(self) -> Held | None:
        return self._held

    def load(self, span: Span, report: Report | None = None) -> Held:
        """Load a span and serve it.

        Raises `CheckpointError`, `UnsupportedModel` and `InvalidSetting` as `load_span` does, `AdapterError` when an adapter is not
        any more what it was, `RuntimeError`, `MemoryError` or `OSError` when the machine has no room or does not read, and `NetworkError`
        when this server is told to leave meanwhile.
        """

        def told(done: int, total: int) -> None:
            if self._leaving_for_good.is_set():
                raise NetworkError("this server is leaving")
            log.debug("%d of blocks %s loaded", done, span)
            if report is not None:
                report(done, total)

        engine, throughput = on_passing_thread(lambda go_on: self._prepare(span, told, go_on))
        engine.start()
        with self._lock:
            if self._leaving_for_good.is_set():
                engine.stop()
                raise NetworkError("this server is leaving")
            server = SpanServer(engine, self._network, SpanServerConfig(wire_dtype=self._offer.wire_dtype), self._probes)
            self._held = Held(engine, server, Meter(engine, throughput))
            return self._held

    def _prepare(self, span: Span, told: Callable[[int, int], None], go_on: GoOn) -> tuple[Engine, float]:
        """An engine that is not started, and its throughput."""

        def progress(done: int, total: int) -> None:
            go_on()
            told(done, total)

        offer = self._offer
        model = load_span(offer.directory, span, dtype=offer.dtype, weights=offer.weights, device=offer.device, progress=progress)
        engine = Engine(model, offer.engine, offer.parts)
        self._hold_adapters(engine)
        return engine, measure_throughput(engine)

    def _hold_adapters(self, engine: Engine) -> None:
        for offered in self._offer.adapters:
            adapter = load_adapter(offered.directory, engine.model.arch)
            if adapter.digest != offered.digest:
                raise AdapterError(f"{offered.directory} is another adapter than when this server began: start the server again")
            engine.adapters.hold(adapter.part(engine.model.span))

    def let_go(self) -> None:
        """Hold nothing any more, and free its memory. Whoever has a session here is told that it ended."""
        with self._lock:
            held, self._held = self._held, None
            self._network.listen(self._answer_empty, self._probes.forget)
        if held is not None:
            held.server.stop()
        del held
        gc.collect()  # sessions and callbacks refer to one another, and through the engine to the weights
        if torch.device(self._offer.device).type == "cuda":
            torch.cuda.empty_cache()

    def drain(self, *, draining: bool) -> None:
        """Take no new sessions and ask those that are open to go on elsewhere, or take sessions again."""
        with self._lock:
            if self._held is None or self._leaving_for_good.is_set():
                return
            if draining:
                self._held.server.leave()
            else:
                self._held.server.stay()

    def leave_for_good(self) -> None:
        """From now on nothing is loaded, and the sessions of what is held are asked to go on elsewhere."""
        with self._lock:
            self._leaving_for_good.set()
            if self._held is not None:
                self._held.server.leave()

    def _answer_empty(self, sender: str, message: WireMessage) -> None:
        self._probes.receive(sender, message)
        if isinstance(message, Ping):
            self._send(sender, Pong(message.nonce))
        elif isinstance(message, AskCounters):
            self._send(sender, Counters({}))
        empty = NetworkError("this server is loading a span and serves none yet")
        if isinstance(message, StepFrame):
            self._send(message.client or sender, failed_of(empty, message.session, message.generation, peer=self._network.me))
        elif isinstance(message, (ForwardFrame, BackwardFrame)):
            self._send(sender, failed_of(empty, str(message.call), 0, peer=self._network.me))

    def _send(self, peer: str, message: WireMessage) -> None:
        with suppress(NetworkError):
            self._network.send(peer, message)
