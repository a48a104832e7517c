"""A swarm without machines: servers that place themselves by `corolla.swarm.placement`, on a virtual clock.

Everything is drawn from one seed. A server publishes its record as a real one would: every `PUBLISH` seconds and at each
change of state, to expire after `EXPIRY`. What others see of it is old by up to `lag` seconds, and a killed server is seen
until its record expires. Throughputs are measured with an error of up to 5%. Loading a span takes `LOADING` seconds, in
which a server holds nothing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

from corolla.swarm.placement import Mover, choose_span, strengths
from corolla.swarm.records import ServerRecord, State
from corolla.swarm.routing import coverage

TICK = 5.0  # seconds of the virtual clock; all times below are multiples of it
CHECK = 30.0
PUBLISH = 20.0
EXPIRY = 60.0
LOADING = 30.0


def make_record(peer: str, start: int, end: int, **changes: object) -> ServerRecord:
    """A ready server of a model of 12 blocks, with room; `changes` are fields to set otherwise."""
    fields: dict[str, object] = {
        "peer": peer,
        "name": peer,
        "model": "m",
        "checkpoint": "c",
        "start": start,
        "end": end,
        "blocks": 12,
        "hidden": 64,
        "dtype": "float32",
        "weights": "plain",
        "throughput": 1000.0,
        "free_tokens": 4096,
        "active": 0,
        "round_trips": {},
        "addresses": (),
        "version": "0",
        "state": "ready",
        "expires": 1000.0,
    }
    return ServerRecord(**{**fields, **changes})  # type: ignore[arg-type]


@dataclass(eq=False)
class Server:
    peer: str
    capacity: int
    throughput: float
    measured: float  # the throughput, as it was measured last
    mover: Mover
    offset: int  # of its checks and publications, in ticks
    start: int = 0
    end: int = 0
    state: State = "joining"
    active: int = 0
    loaded: float = 0.0  # when the span will be, or was, loaded


class Simulation:
    """`now` is the virtual time in seconds. `moves` are (time, peer) of servers that changed their span, `cuts` the moves
    of servers that were the last living holder of a block of a swarm that was whole."""

    def __init__(self, seed: int, *, blocks: int = 32, lag: float = 10.0) -> None:
        self.blocks = blocks
        self.now = 0.0
        self.servers: dict[str, Server] = {}
        self.moves: list[tuple[float, str]] = []
        self.cuts: list[tuple[float, str]] = []
        self.server_hours = 0.0
        self.random = random.Random(seed)
        self._published: dict[str, ServerRecord] = {}
        self._views: deque[list[ServerRecord]] = deque([[]], maxlen=int(lag / TICK) + 1)
        self._born = 0

    def join(self) -> None:
        """A new server of some capacity and throughput takes the span that it thinks the swarm lacks most."""
        self._born += 1
        throughput = 100 * self.random.lognormvariate(0, 0.7)
        server = Server(
            peer=f"peer{self._born:04}",
            capacity=self.random.randint(2, 8),
            throughput=throughput,
            measured=throughput,
            mover=Mover(self.random.getrandbits(32)),
            offset=self.random.randrange(1000),
        )
        self.servers[server.peer] = server
        span = choose_span(self.view(), blocks=self.blocks, capacity=server.capacity, throughput=server.throughput)
        self._load(server, span.start, span.end)

    def kill(self, peer: str) -> None:
        """The server is gone; its record stays until it expires."""
        del self.servers[peer]

    def leave(self, peer: str) -> None:
        """The server is gone and has withdrawn its record."""
        del self.servers[peer]
        self._published.pop(peer, None)

    def view(self) -> list[ServerRecord]:
        """The unexpired records as somebody sees them, up to `lag` seconds ago."""
        return [record for record in self.random.choice(self._views) if record.expires > self.now]

    def run(self, seconds: float) -> Iterator[float]:
        """Let time pass, yielding after each tick, when servers may be made to join, leave or die."""
        end = self.now + seconds
        while self.now < end:
            self.now += TICK
            for server in list(self.servers.values()):
                self._act(server)
            self.server_hours += len(self.servers) * TICK / 3600
            self._views.append([record for record in self._published.values() if record.expires > self.now])
            yield self.now

    def pass_time(self, seconds: float) -> None:
        """Let time pass undisturbed."""
        for _ in self.run(seconds):
            pass

    @property
    def serving(self) -> list[ServerRecord]:
        """The truth: the records of the servers that live and have their span loaded."""
        return [self._record(server, server.throughput) for server in self.servers.values() if server.state != "joining"]

    @property
    def whole(self) -> bool:
        """Whether living servers hold every block."""
        return all(coverage(self.serving, self.blocks))

    @property
    def throughput(self) -> float:
        """Rows/s of the weakest block."""
        return min(strengths(self.serving, self.blocks))

    @property
    def bound(self) -> float:
        """Rows/s that no placement can exceed: each server gives its throughput to its blocks in all, so the weakest of the
        blocks gets at most the mean. The best placement may well lie below."""
        return sum(server.throughput for server in self.servers.values()) / self.blocks

    def best_found(self, tries: int) -> float:
        """Rows/s of the best placement that an optimiser finds which knows everything and moves servers at no cost: one after
        the other takes the best span among the others, until none gains; the best of `tries` orders of the servers."""
        best = 0.0
        for _ in range(tries):
            order = sorted(self.servers.values(), key=lambda server: server.peer)
            self.random.shuffle(order)
            placed: dict[str, ServerRecord] = {}
            unchanged = 0
            for server in islice(cycle(order), 30 * len(order)):
                before = placed.pop(server.peer, None)
                span = choose_span(placed.values(), blocks=self.blocks, capacity=server.capacity, throughput=server.throughput)
                placed[server.peer] = make_record(server.peer, span.start, span.end, blocks=self.blocks, throughput=server.throughput)
                unchanged = unchanged + 1 if before is not None and before.span == span else 0
                if unchanged == len(order):
                    break
            best = max(best, min(strengths(placed.values(), self.blocks)))
        return best

    def _act(self, server: Server) -> None:
        tick = int(self.now / TICK) + server.offset
        if server.state == "joining":
            if self.now >= server.loaded:
                server.state = "ready"
                self._publish(server)
        elif tick % int(CHECK / TICK) == 0:
            span = server.mover.consider(self.view(), self._record(server, server.measured), now=self.now, capacity=server.capacity)
            if span is not None:
                self._move(server, span.start, span.end)
            elif server.mover.draining != (server.state == "draining"):
                server.state = "draining" if server.mover.draining else "ready"
                self._publish(server)
        if tick % int(PUBLISH / TICK) == 0:
            self._publish(server)

    def _move(self, server: Server, start: int, end: int) -> None:
        holders = coverage(self.serving, self.blocks)
        if all(holders) and min(holders[server.start : server.end]) == 1:
            self.cuts.append((self.now, server.peer))
        self.moves.append((self.now, server.peer))
        self._load(server, start, end)

    def _load(self, server: Server, start: int, end: int) -> None:
        server.start, server.end = start, end
        server.state = "joining"
        server.loaded = self.now + LOADING
        self._publish(server)

    def _publish(self, server: Server) -> None:
        server.active = int(self.random.random() < 0.2)
        server.measured = server.throughput * self.random.uniform(0.95, 1.05)
        self._published[server.peer] = self._record(server, server.measured)

    def _record(self, server: Server, throughput: float) -> ServerRecord:
        return make_record(
            server.peer,
            server.start,
            server.end,
            blocks=self.blocks,
            throughput=throughput,
            state=server.state,
            active=server.active,
            expires=self.now + EXPIRY,
        )
