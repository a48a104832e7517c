"""A server in a swarm: it loads a span, says what it measures of itself, moves where the swarm needs it, and drains when it goes."""

from __future__ import annotations

import logging
import random
import statistics
import threading
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

import corolla
from corolla.barrier import barrier
from corolla.errors import CorollaError
from corolla.models.catalog import resolve
from corolla.models.checkpoint import Progress
from corolla.server.announcing import Announcer, Peer, nearest, next_servers, to_ask
from corolla.server.cores import SharedCores
from corolla.server.health import HealthWatch
from corolla.server.settings import ServeConfig, ServerSettings, settle_terms
from corolla.server.span_manager import Held, Report, SpanManager
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.placement import Mover, choose_span
from corolla.swarm.probing import Probes
from corolla.swarm.records import MAX_ADDRESS, MAX_ADDRESSES, ServerRecord, State
from corolla.swarm.routing import quality
from corolla.types import Span

log = logging.getLogger(__name__)
_POLL = 0.05  # seconds
_TO_MOVE = 2.0  # seconds that an idle session has to go on elsewhere when its server ends
_TO_WITHDRAW = 10.0  # seconds until the rest goes on without the withdrawal
_AT_ONCE = 0.5  # seconds that it gets where everything has to end at once


class RunningServer:
    """A server that is up, until `close`. `addresses` are what others join through.

    Raises what `SpanManager.load` does, and `NetworkError` when the first announcement does not go out.
    """

    def __init__(
        self, peer: Peer, terms: ServerSettings, config: ServeConfig, report: Report | None = None, cores: SharedCores | None = None
    ) -> None:
        self._peer, self._terms, self._config, self._cores = peer, terms, config, cores
        self._addresses = tuple(address for address in peer.addresses if len(address) <= MAX_ADDRESS)[:MAX_ADDRESSES]
        self._chance = random.Random(peer.network.me)
        self._mover = Mover(zlib.crc32(peer.network.me.encode()), config.moving)
        self._draining = False
        self._stays_until = self._retries_at = float("-inf")
        self._neighbours: Sequence[str] = ()
        self._probes = Probes(peer.network.send, config.probing)
        self._holder = SpanManager(peer.network, terms.offer, self._probes)
        others = self._proven_others() if config.span is None else []
        # This server has not measured itself yet: it takes itself for one like the others.
        self._throughput = statistics.median([record.throughput for record in others]) if others else 1.0
        self._span = config.span or self._choose(others)
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
        self._health = HealthWatch(self._find_failure, self._die, config.look_every)

    @property
    def addresses(self) -> list[str]:
        return self._peer.addresses

    @property
    def adapters(self) -> dict[str, str]:
        """The digests of the adapters that it holds, by name."""
        return {adapter.name: adapter.digest for adapter in self._terms.offer.adapters}

    @property
    def span(self) -> Span:
        """The blocks that it holds or loads."""
        return self._span

    @property
    def failure(self) -> str | None:
        """Why this server is dead: which part of it ended, and what to do. None while it lives."""
        return self._health.failure

    def close(self, at_once: threading.Event | None = None) -> None:
        """Withdraw the record, let the sessions go on elsewhere, leave the swarm and stop the engine.

        Answers that nobody else can take are served here for up to `drain_timeout`, or until `at_once` is set; a server that is dead
        (see `failure`) serves none. Closing twice is no error.
        """
        at_once = at_once or threading.Event()
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._withdraw(at_once)
        self._holder.leave_for_good()
        began = time.monotonic()
        while self.failure is None and self._in_the_way(time.monotonic() - began) and not at_once.wait(_POLL):
            pass
        self._health.end()
        held = self._holder.held
        if held is not None and self.failure is None:  # an engine that hangs would never stop
            if held.server.sessions:
                log.warning("sessions that nobody else could take: %d", held.server.sessions)
            held.server.close()
        self._peer.close()

    def _withdraw(self, at_once: threading.Event) -> None:
        """On a thread of its own: the directory may not answer for as long as half a minute."""
        withdrawing = threading.Thread(target=self._announcer.withdraw, name="corolla-withdraw", daemon=True)
        withdrawing.start()
        deadline = time.monotonic() + _TO_WITHDRAW
        while withdrawing.is_alive() and not at_once.is_set() and time.monotonic() < deadline:
            withdrawing.join(_POLL)
        if at_once.is_set():
            withdrawing.join(_AT_ONCE)

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
        like_this = (self._terms.blocks, self._terms.hidden, offer.quality)
        return [record for record in records if record.peer != me and (record.blocks, record.hidden, quality(record)) == like_this]

    def _proven_others(self) -> list[ServerRecord]:
        """The others that this server has seen at work, or that load, after a moment in which each of them could answer."""
        others, deadline = self._others(), time.monotonic() + self._config.proofs
        self._probes.ask(others)
        while self._probes.waiting and time.monotonic() < deadline:
            time.sleep(_POLL)
            self._probes.ask(others)  # a few at a time
        return self._probes.believed(others)

    def _choose(self, others: list[ServerRecord]) -> Span:
        return choose_span(others, blocks=self._terms.blocks, capacity=self._terms.capacity, throughput=self._throughput)

    def _choose_again(self, known: Collection[str]) -> None:
        """Of servers that start together all choose the same span: now that each is announced, those of higher ids yield."""
        others = [record for record in self._proven_others() if record.peer in known or record.peer < self._peer.network.me]
        span = self._choose(others)
        if span != self._span:
            self._span = span
            self._announcer.now()

    # On this server's own thread from here on.

    def _live(self) -> None:
        while not self._stopping.wait(self._config.announce_every):
            with barrier("the server's life"):
                try:
                    self._look_around()
                except CorollaError as error:
                    log.warning("the swarm could not be looked at: %s", error)

    def _look_around(self) -> None:
        held = self._holder.held
        if held is None:
            if time.monotonic() >= self._retries_at:
                self._take_up(self._span)
            return
        held.meter.update()
        if self._cores is not None:
            held.engine.threads = self._cores.share
        others, me = self._others(), self._describe()
        # Before this server leaves its blocks, whoever else says that they hold them proves it again.
        urgent = [record.peer for record in others if record.start < me.end and me.start < record.end] if self._mover.draining else []
        self._probes.ask(others, urgent)
        records = self._probes.believed(others)
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
        with barrier("loading blocks"):
            try:
                self._throughput = self._holder.load(span).meter.throughput
            except (CorollaError, OSError, RuntimeError, MemoryError) as error:
                log.error("blocks %s were not loaded: %s", span, error)
            else:
                log.info("blocks %s are loaded", span)
                self._announcer.now()
                return True
        self._retries_at = time.monotonic() + self._config.retry_every
        return False

    # On the thread of the health watch.

    def _find_failure(self) -> str | None:
        if (failure := self._peer.failure) is not None:
            return failure
        held = self._holder.held
        if held is None or held.engine.healthy or held is not self._holder.held:  # one that was let go of just now is stopped
            return None
        stalled = f"the engine has not gone on for {held.engine.config.stall_after:g} s, although there is work"
        return f"the engine ended: {held.engine.failure}" if held.engine.failure else stalled

    def _die(self, failure: str) -> None:
        log.error("this server is dead and leaves the swarm: %s", failure)
        self._announcer.withdraw()
        self._holder.leave_for_good()

    # On any thread.

    def _describe(self) -> ServerRecord:
        held, offer = self._holder.held, self._terms.offer
        # What others cannot dial is not ready; the peer itself says why.
        state: State = "joining" if held is None or self._peer.reachable is False else "draining" if self._draining else "ready"
        return ServerRecord(
            peer=self._peer.network.me,
            name=self._config.name,
            model=self._terms.model_id,
            checkpoint=offer.checkpoint,
            start=self._span.start,
            end=self._span.end,
            blocks=self._terms.blocks,
            hidden=self._terms.hidden,
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
            adapters=self.adapters,
            takes_adapters=offer.engine.take_adapters,
        )


@contextmanager
def serving(model: str, peer: PeerConfig, config: ServeConfig, progress: Progress | None = None) -> Iterator[RunningServer]:
    """Join a swarm and serve a span of `model` until the block ends, then drain; see `RunningServer.close`.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel, AdapterError, InvalidSetting, NetworkError: as their sentences say.
    """
    directory = resolve(model, progress=progress)
    joined = SwarmPeer(peer)  # before any thread of torch
    with SharedCores(torch.get_num_threads(), config.threads) as cores:
        try:
            torch.set_num_threads(cores.share)
            report = None if progress is None else lambda done, total: progress("loading", done, total)
            terms = settle_terms(directory, config)
            joined.network.bound(terms.frames_memory)
            running = RunningServer(joined, terms, config, report, cores)
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
