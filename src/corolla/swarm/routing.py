"""A route through a swarm: every block once, in the least time per step. Pure functions over records; nothing is sent.

What a step costs on its way round the ring, in seconds:

- at a server, `rows * blocks used / throughput`, times one more than the sessions that have a step under way there;
- from each server to the next, and from the last one back to the first, half of the round trip between them;
- from the client to the first server and from the last one to the client, half of the round trip, once in an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from corolla.errors import NoRoute
from corolla.messages import Hop
from corolla.swarm.records import ServerRecord
from corolla.types import Span

UNKNOWN_ROUND_TRIP = 0.1
"""Seconds assumed between two peers that have not measured it: long, so that a measured link is tried first."""

_STEPS_OF_AN_ANSWER = 64  # the client's own way is gone once, the ring once for each of these
_SAME = 1 - 1e-9  # sums of the same numbers in another order differ by less
_AT_MOST = 1e9  # seconds; what strangers claim may not add up to infinity
_DOUBT = 1e3  # seconds that a block counts at a server that is not proven: any way along proven ones is quicker


class Quality(NamedTuple):
    """What the servers of a route have in common: the dtype they compute in, the format of their weights, and the weights."""

    dtype: str
    weights: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """The LoRA adapter of a session; if it is `brought`, the client gives it to servers that take adapters."""

    digest: str
    brought: bool

    def held_by(self, record: ServerRecord) -> bool:
        return self.digest in record.adapters.values()

    def served_by(self, record: ServerRecord) -> bool:
        return self.held_by(record) or (self.brought and record.takes_adapters)


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that cover every block once, in order, each at a server of its own; `seconds` is what a step should take.
    `quality` is that of all its servers, or None where they differ. `lacking` are those that have to be given the adapter.
    """

    hops: tuple[Hop, ...]
    seconds: float
    quality: Quality | None = None
    lacking: frozenset[str] = frozenset()

    @property
    def peers(self) -> tuple[str, ...]:
        """The servers in order."""
        return tuple(hop.peer for hop in self.hops)


def coverage(records: Iterable[ServerRecord], blocks: int) -> list[int]:
    """How many of the records hold each of `blocks` blocks. Their states are not looked at,
    nor when they expire; those of a longer model do not count."""
    changes = [0] * (blocks + 1)
    for record in records:
        if record.end <= blocks:
            changes[record.start] += 1
            changes[record.end] -= 1
    return list(accumulate(changes[:blocks]))


def gaps(records: Iterable[ServerRecord], blocks: int) -> tuple[Span, ...]:
    """The blocks that none of the records hold, as the fewest spans."""
    missing = [block for block, holders in enumerate(coverage(records, blocks)) if not holders]
    runs = ([block for _, block in run] for _, run in groupby(enumerate(missing), key=lambda pair: pair[1] - pair[0]))
    return tuple(Span(run[0], run[-1] + 1) for run in runs)


def quality(record: ServerRecord) -> Quality:
    return Quality(record.dtype, record.weights, record.checkpoint)


def find_route(
    records: Iterable[ServerRecord],
    *,
    blocks: int,
    now: float,
    banned: Collection[str],
    needed_tokens: int,
    prefer: Mapping[str, float] | None = None,
    rows: int = 1,
    like: Quality | None = None,
    mixed: bool = False,
    holding: Collection[str] = (),
    adapter: WantedAdapter | None = None,
    proven: Collection[str] | None = None,
) -> Route:
    """The quickest route for a session of one model, the same one for the same records in any order.

    Servers are used that are ready at `now` (Unix time), not among the `banned` peers, and have room for `needed_tokens`
    positions. `holding` names the servers that hold the session already: they may be draining or full.
    `prefer` is the client's own round trip to each peer in seconds, `rows` the tokens of a step. With an `adapter` servers are used
    that hold it, or take it.

    All servers of a route have the same weights, always, and unless `mixed` is set keep them in one format and compute in one
    dtype. A session that goes on elsewhere is of the quality `like`: others count only where servers of it leave gaps.

    `proven` are the peers that this client has seen at work: others are used only for blocks that none of them holds (of a quality
    that they do not hold wholly, where there is no better). None is all of them.

    A server is entered and left at any block of its span, but never twice. The search is exact: for each server that could
    be the first, costs are followed back from the last block, over boundaries of blocks, to the closing of the ring; first
    servers are left out whose bound from below exceeds the best ring found. Where the quickest way returns to a
    server, that server computes the blocks in between too, which is then not always the very best.

    Raises `NoRoute` with the blocks that no such server holds (of the quality that lacks the fewest).
    """
    qualities: dict[Quality, list[ServerRecord]] = {}
    for record in sorted(records, key=lambda record: record.peer):
        known = record.peer in holding
        able = record.state == "ready" or (known and record.state == "draining")
        roomy = known or record.free_tokens >= needed_tokens
        sound = record.blocks == blocks and record.throughput > 0
        fitting = adapter is None or adapter.served_by(record)
        if able and roomy and sound and fitting and record.expires > now and record.peer not in banned:
            qualities.setdefault(Quality("", "", record.checkpoint) if mixed else quality(record), []).append(record)
    if like in qualities and not gaps(qualities[like], blocks):
        qualities = {like: qualities[like]}
    routes: list[tuple[int, Route]] = []
    lacking: list[tuple[Span, ...]] = [(Span(0, blocks),)]
    for same, servers in sorted(qualities.items()):
        missing = gaps(servers, blocks)
        if missing:
            lacking.append(missing)
        else:
            strangers = frozenset[str]() if proven is None else frozenset(r.peer for r in servers if r.peer not in proven)
            route = _Ring(servers, blocks, rows, prefer, strangers).quickest()
            doubted = sum(hop.end - hop.start for hop in route.hops if hop.peer in strangers)
            ungiven = frozenset(r.peer for r in servers if r.peer in route.peers and adapter is not None and not adapter.held_by(r))
            seconds = route.seconds - doubted * _DOUBT
            routes.append((doubted, replace(route, seconds=seconds, quality=None if mixed else same, lacking=ungiven)))
    if not routes:
        raise NoRoute(min(lacking, key=lambda spans: sum(map(len, spans))), adapter="" if adapter is None else adapter.digest)
    return min(routes, key=lambda found: (found[0], _order(found[1])))[1]


def seconds_along(records: Iterable[ServerRecord], route: Route, *, blocks: int, prefer: Mapping[str, float] | None = None) -> float | None:
    """What a step of one token takes along a route by these records; None where one of its servers is not among them,
    or computes nothing."""
    servers = {record.peer: record for record in records}
    if not all(hop.peer in servers and servers[hop.peer].throughput > 0 for hop in route.hops):
        return None
    return _Ring([servers[peer] for peer in route.peers], blocks, 1, prefer).seconds(
        [(i, h.start, h.end) for i, h in enumerate(route.hops)]
    )


def _order(route: Route) -> tuple[float, int, tuple[str, ...]]:
    return route.seconds, len(route.hops), route.peers


class _Ring:
    """The ways round the ring through servers of which at least one holds each block. Servers go by their index."""

    def __init__(
        self,
        servers: Sequence[ServerRecord],
        blocks: int,
        rows: int,
        prefer: Mapping[str, float] | None,
        doubted: Collection[str] = (),
    ) -> None:
        self._servers = servers
        self._blocks = blocks
        self._compute = [  # seconds of one block
            min(rows * (1 + server.active) / server.throughput, _AT_MOST) + (_DOUBT if server.peer in doubted else 0.0)
            for server in servers
        ]
        self._holders = [[i for i, server in enumerate(servers) if server.start <= block < server.end] for block in range(blocks)]
        self._client = [0.0] * len(servers)
        if prefer is not None:
            self._client = [_half(prefer.get(server.peer, UNKNOWN_ROUND_TRIP)) / _STEPS_OF_AN_ANSWER for server in servers]
        index = {server.peer: i for i, server in enumerate(servers)}
        self._known: list[dict[int, float]] = [{} for _ in servers]
        for i, server in enumerate(servers):
            for peer, seconds in server.round_trips.items():
                if (j := index.get(peer, i)) != i:
                    self._known[i][j] = _half(seconds)
                    self._known[j].setdefault(i, _half(seconds))
        self._nearest = [min((_half(UNKNOWN_ROUND_TRIP), *known.values())) for known in self._known]

    def quickest(self) -> Route:
        """The route of the least seconds; of equal ones, that with the fewest hops, then with the lowest peers."""
        open_ended, _ = self._ways(None)
        best: Route | None = None
        for bound, first in sorted((seconds + self._client[i] + self._least_return(i), i) for i, seconds in open_ended.items()):
            if best is not None and bound >= best.seconds * _SAME:
                break
            _, onward = self._ways(first)
            hops = _without_returns(self._follow(first, onward))
            route = Route(tuple(Hop(self._servers[i].peer, start, end) for i, start, end in hops), self.seconds(hops))
            best = route if best is None else min(best, route, key=_order)
        assert best is not None, "every block has a holder"
        return best

    def _ways(self, home: int | None) -> tuple[dict[int, float], list[dict[int, int]]]:
        """The least seconds from block 0 at each server to the end and back to `home` (to nowhere: free), and for each
        block and server that holds it, the server that computes the next block on that way."""
        onward: list[dict[int, int]] = [{} for _ in range(self._blocks)]
        seconds: dict[int, float] = {}
        for block in reversed(range(self._blocks)):
            following = sorted((cost, i) for i, cost in seconds.items())
            here = {}
            for i in self._holders[block]:
                then = i
                if block == self._blocks - 1:
                    least = self._client[i] + (0.0 if home is None else self._passing(i, home))
                else:
                    least = seconds.get(i, float("inf"))
                    for cost, j in following:
                        if cost + self._nearest[i] >= least:
                            break  # nor can any after it be quicker
                        if (total := cost + self._passing(i, j)) < least * _SAME:
                            least, then = total, j
                here[i] = self._compute[i] + least
                onward[block][i] = then
            seconds = here
        return seconds, onward

    def _follow(self, first: int, onward: list[dict[int, int]]) -> list[tuple[int, int, int]]:
        """The way from `first`, as (server, start, end)."""
        hops = []
        server, start = first, 0
        for block in range(self._blocks):
            then = onward[block][server]
            if then != server or block == self._blocks - 1:
                hops.append((server, start, block + 1))
                server, start = then, block + 1
        return hops

    def seconds(self, hops: Sequence[tuple[int, int, int]]) -> float:
        """What a step takes along hops, as (server, start, end)."""
        computing = sum(self._compute[i] * (end - start) for i, start, end in hops)
        passing = sum(self._passing(one, other) for (one, *_), (other, *_) in pairwise((*hops, hops[0])))
        return computing + passing + self._client[hops[0][0]] + self._client[hops[-1][0]]

    def _passing(self, one: int, other: int) -> float:
        return 0.0 if one == other else self._known[one].get(other, UNKNOWN_ROUND_TRIP / 2)

    def _least_return(self, first: int) -> float:
        return min(self._passing(last, first) for last in self._holders[-1])


def _half(round_trip: float) -> float:
    return min(round_trip / 2, _AT_MOST)


def _without_returns(hops: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    kept: list[tuple[int, int, int]] = []
    for server, start, end in hops:
        before = next((place for place, (other, *_) in enumerate(kept) if other == server), len(kept))
        entered = kept[before][1] if before < len(kept) else start
        kept[before:] = [(server, entered, end)]
    return kept
