"""A server in a swarm: it loads a span, says what it measures of itself, moves where the swarm needs it, and drains when it goes."""

from __future__ import annotations

import json
import logging
import random
import statistics
import threading
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import corolla
from corolla.engine.engine import EngineConfig
from corolla.errors import CorollaError, InvalidSetting, NetworkError
from corolla.models.catalog import resolve
from corolla.models.checkpoint import Checkpoint, Progress
from corolla.models.families import architecture
from corolla.models.linear import WeightFormat
from corolla.models.quantized_files import settled_weights
from corolla.models.span import DTYPES
from corolla.server.announcing import Announcer, Peer, nearest, next_servers, to_ask
from corolla.server.capacity import Footprint, available, footprint
from corolla.server.embedded import fast_dtype
from corolla.server.holding import Held, Holder, Offer, Report
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.placement import MovePolicy, Mover, choose_span
from corolla.swarm.records import MAX_ADDRESS, MAX_ADDRESSES, ServerRecord, State, fingerprint
from corolla.swarm.routing import quality
from corolla.swarm.wire import WireDtype
from corolla.types import Span

log = logging.getLogger(__name__)
_POLL = 0.05  # seconds
_TO_MOVE = 2.0  # seconds that an idle session has to go on elsewhere when its server ends


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    span: Span | None = None  # None: what the swarm lacks most, and another one when that changes
    capacity: int | None = None  # blocks, where the span is chosen; None: as many as the memory holds
    memory: int | None = None  # bytes for weights and cache; None: most of what is available on the device
    name: str = ""
    device: str | None = None  # "cpu", "cuda", "cuda:1"; None: a CUDA device where there is one
    dtype: str | None = None
    weights: WeightFormat | None = None
    wire_dtype: WireDtype | None = None  # of the hidden states sent on; None: that of the model
    threads: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    announce_every: float = 5.0  # seconds; also between two looks at the others' records
    lifetime: float = 20.0  # of an announcement, in seconds: how long a server that died is still listed
    drain_timeout: float = 30.0  # seconds for which answers that nobody else can take are still served when it ends
    # Half of the usual times: records are looked up every `announce_every`, so that they spread sooner.
    moving: MovePolicy = field(default_factory=lambda: MovePolicy(pace=10.0, settle=10.0))
    stay_after_failure: float = 600.0  # seconds without a move after one that could not be made
    retry_every: float = 30.0  # seconds until a span that could not be loaded is tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a server offers for as long as it lives, once its settings are settled."""

    offer: Offer
    model_id: str
    blocks: int
    capacity: int  # blocks


class RunningServer:
    """A server that is up, until `close`. `addresses` are what others join through.

    Raises what `Holder.load` does, and `NetworkError` when the first announcement does not go out.
    """

    def __init__(self, peer: Peer, terms: Terms, config: ServeConfig, report: Report | None = None) -> None:
        self._peer, self._terms, self._config = peer, terms, config
        self._addresses = tuple(address for address in peer.addresses if len(address) <= MAX_ADDRESS)[:MAX_ADDRESSES]
        self._chance = random.Random(peer.network.me)
        self._mover = Mover(zlib.crc32(peer.network.me.encode()), config.moving)
        self._draining = False
        self._stays_until = self._retries_at = float("-inf")
        self._neighbours: Sequence[str] = ()
        others = self._others()
        # This server has not measured itself yet: it takes itself for one like the others.
        self._throughput = statistics.median([record.throughput for record in others]) if others else 1.0
        self._span = config.span or self._choose(others)
        self._holder = Holder(peer.network, terms.offer)
        self._stopping = threading.Event()
        self._announcer = Announcer(peer, self._describe, config.announce_every)
        try:
            if config.span is None:
                self._choose_again({record.peer for record in others})
            self._throughput = self._holder.load(self._span, report).meter.throughput
        except BaseException:
            self._announcer.withdraw()
            raise
        self._announcer.now()
        self._life = threading.Thread(target=self._live, name="corolla-server", daemon=True)
        self._life.start()

    @property
    def addresses(self) -> list[str]:
        return self._peer.addresses

    @property
    def span(self) -> Span:
        """The blocks that it holds or loads."""
        return self._span

    def close(self, at_once: threading.Event | None = None) -> None:
        """Withdraw the record, let the sessions go on elsewhere, leave the swarm and stop the engine.

        Answers that nobody else can take are served here for up to `drain_timeout`, or until `at_once` is set. Closing twice is no
        error.
        """
        at_once = at_once or threading.Event()
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._announcer.withdraw()
        self._holder.leave_for_good()
        began = time.monotonic()
        while self._in_the_way(time.monotonic() - began) and not at_once.wait(_POLL):
            pass
        held = self._holder.held
        if held is not None:
            if held.server.sessions:
                log.warning("sessions that nobody else could take: %d", held.server.sessions)
            held.server.close()
        self._peer.close()

    def _in_the_way(self, waited: float) -> bool:
        """Whether something still has to be waited for before this server ends, after so many seconds."""
        held = self._holder.held
        if waited >= self._config.drain_timeout:
            return False
        if self._life.is_alive() or held is None:
            return self._life.is_alive()
        return held.engine.active > 0 or (held.server.sessions > 0 and waited < _TO_MOVE)

    def _others(self) -> list[ServerRecord]:
        """The records of the servers that this one may share a route with."""
        offer, me = self._terms.offer, self._peer.network.me
        records = self._peer.servers(self._terms.model_id)
        return [record for record in records if record.peer != me and quality(record) == offer.quality]

    def _choose(self, others: list[ServerRecord]) -> Span:
        return choose_span(others, blocks=self._terms.blocks, capacity=self._terms.capacity, throughput=self._throughput)

    def _choose_again(self, known: Collection[str]) -> None:
        """Of servers that start together all choose the same span: now that each is announced, those of higher ids yield."""
        others = [record for record in self._others() if record.peer in known or record.peer < self._peer.network.me]
        span = self._choose(others)
        if span != self._span:
            self._span = span
            self._announcer.now()

    # On this server's own thread from here on.

    def _live(self) -> None:
        while not self._stopping.wait(self._config.announce_every):
            try:
                self._look_around()
            except NetworkError as error:
                log.warning("the swarm could not be looked at: %s", error)

    def _look_around(self) -> None:
        held = self._holder.held
        if held is None:
            if time.monotonic() >= self._retries_at:
                self._take_up(self._span)
            return
        held.meter.update()
        records = self._peer.servers(self._terms.model_id)
        me = self._describe()
        self._neighbours = next_servers(records, me)
        round_trips = held.server.round_trips
        round_trips.ask(to_ask(self._neighbours, round_trips.seconds, self._chance))
        if self._config.span is None and time.monotonic() >= self._stays_until:
            self._consider_moving(held, records, me)

    def _consider_moving(self, held: Held, records: Sequence[ServerRecord], me: ServerRecord) -> None:
        target = self._mover.consider(records, me, now=time.time(), capacity=self._terms.capacity)
        if target is not None:
            self._move(held.span, target)
        elif self._mover.draining != self._draining:
            self._draining = self._mover.draining
            self._holder.drain(draining=self._draining)
            self._announcer.now()

    def _move(self, old: Span, target: Span) -> None:
        """Only one of the spans has to fit the memory: what is held is let go of first, and loaded again if the other cannot be."""
        log.info("this server goes from blocks %s to %s", old, target)
        self._holder.let_go()
        self._draining = False
        self._span = target
        self._announcer.now()
        if not self._take_up(target):
            self._stays_until = time.monotonic() + self._config.stay_after_failure
            self._take_up(old)

    def _take_up(self, span: Span) -> bool:
        """Load and serve a span; whether that went well. If not, it is tried again later."""
        self._span = span
        try:
            self._throughput = self._holder.load(span).meter.throughput
        except (CorollaError, OSError, RuntimeError, MemoryError) as error:
            log.error("blocks %s were not loaded: %s", span, error)
            self._retries_at = time.monotonic() + self._config.retry_every
            return False
        log.info("blocks %s are loaded", span)
        self._announcer.now()
        return True

    # On any thread.

    def _describe(self) -> ServerRecord:
        held, offer = self._holder.held, self._terms.offer
        state: State = "joining" if held is None else "draining" if self._draining else "ready"
        return ServerRecord(
            peer=self._peer.network.me,
            name=self._config.name,
            model=self._terms.model_id,
            checkpoint=offer.checkpoint,
            start=self._span.start,
            end=self._span.end,
            blocks=self._terms.blocks,
            dtype=offer.dtype,
            weights=offer.weights,
            throughput=self._throughput if held is None else held.meter.throughput,
            free_tokens=0 if held is None else held.engine.free_tokens,
            active=0 if held is None else held.engine.active,
            round_trips={} if held is None else nearest(self._neighbours, held.server.round_trips.seconds),
            addresses=self._addresses,
            version=corolla.__version__,
            state=state,
            expires=time.time() + self._config.lifetime,
        )


@contextmanager
def serving(model: str, peer: PeerConfig, config: ServeConfig, progress: Progress | None = None) -> Iterator[RunningServer]:
    """Join a swarm and serve a span of `model` until the block ends, then drain; see `RunningServer.close`.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel, InvalidSetting, NetworkError: as their sentences say.
    """
    directory = resolve(model, progress=progress)
    joined = SwarmPeer(peer)  # before any thread of torch
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        report = None if progress is None else lambda done, total: progress("loading", done, total)
        running = RunningServer(joined, settle_terms(directory, config), config, report)
    except BaseException:
        joined.close()
        raise
    try:
        yield running
    except BaseException:
        at_once = threading.Event()
        at_once.set()
        running.close(at_once)
        raise
    running.close()


def settle_terms(directory: Path, config: ServeConfig) -> Terms:
    """What a server of the model in `directory` offers on this machine, for what the configuration leaves open.

    Raises `CheckpointError`, `UnsupportedModel`, and `InvalidSetting` for a device that is not there or a span that the memory
    does not hold.
    """
    device = _device(config.device)
    dtype = config.dtype or fast_dtype(device)
    if dtype not in DTYPES:
        raise InvalidSetting("dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
    with Checkpoint(directory) as checkpoint:
        weights = settled_weights(checkpoint, config.weights, "packed" if device == "cpu" else "plain")
        arch = architecture(checkpoint.config)
        takes = footprint(checkpoint, arch, dtype=DTYPES[dtype], weights=weights, cache_tokens=config.engine.cache_tokens)
        digest = checkpoint.digest()
    wire_dtype: WireDtype = config.wire_dtype or dtype  # type: ignore[assignment]
    offer = Offer(
        directory=directory, checkpoint=digest, dtype=dtype, weights=weights, device=device, wire_dtype=wire_dtype, engine=config.engine
    )
    return Terms(offer=offer, model_id=model_fingerprint(directory), blocks=arch.blocks, capacity=_capacity(takes, device, config))


def model_fingerprint(directory: Path) -> str:
    """What names a model in the directory: the same for everybody who has the same checkpoint's config."""
    return fingerprint(json.loads((directory / "config.json").read_bytes()))


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InvalidSetting("device", f"{device!r} is no device; give cpu, cuda or cuda:1") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InvalidSetting("device", f"{device!r} is not supported; give cpu, cuda or cuda:1")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InvalidSetting("device", f"there is no {device} on this machine, which has {torch.cuda.device_count()} CUDA devices")
    return device


def _capacity(takes: Footprint, device: str, config: ServeConfig) -> int:
    """Blocks that a span may have. What the user asks for is only held against the memory that they named too."""
    if config.span is not None:
        if config.memory is not None:
            takes.check(config.span, config.memory)
        return len(config.span)
    if config.capacity is not None and config.memory is None:
        return config.capacity
    holds = takes.capacity(available(device) if config.memory is None else config.memory)
    return holds if config.capacity is None else min(holds, config.capacity)
