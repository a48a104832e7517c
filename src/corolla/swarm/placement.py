"""Which blocks a server should hold, decided by each server alone from the records of all. No clock, no network.

The idea is that of Petals (Borzunov et al., "Distributed Inference and Fine-tuning of Large Language Models Over The
Internet", NeurIPS 2023): a swarm is as quick as its weakest block, so a new server takes the weakest window, and
a server moves when that helps enough. What differs: a move is judged by the blocks that it weakens and strengthens rather than
by simulating everyone's moves after it, and servers that would make the same move spread out in time.

A server that computes `throughput` rows/s of one block gives each block of its span `throughput / len(span)`, for every row
crosses the whole span. A block's strength is the sum over its holders; the swarm's throughput is that of its weakest block.

Gaps go before everything. Where no move of a server alone closes any, servers shift along in the order they stand in until the
model is covered, so a swarm whose spans are long enough together never stays cut.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec

from corolla.errors import InvalidSetting
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import coverage, quality
from corolla.types import Span

_AT_MOST = 1e12  # rows/s; strangers may claim more
_FEW = 8  # servers, over whose waits a move that fewer can make is spread too


def strengths(records: Iterable[ServerRecord], blocks: int) -> list[float]:
    """The rows/s that the records' servers together pass through each of `blocks` blocks."""
    changes = [0] * (blocks + 1)  # in whole millionths, so that neither the records' order nor a gap is lost in rounding
    for record in records:
        if record.end <= blocks:
            share = round(min(record.throughput, _AT_MOST) * 1e6 / (record.end - record.start))
            changes[record.start] += share
            changes[record.end] -= share
    return [total / 1e6 for total in accumulate(changes[:blocks])]


def choose_span(records: Iterable[ServerRecord], *, blocks: int, capacity: int, throughput: float) -> Span:
    """Where a server that holds `capacity` blocks, at `throughput` rows/s through one, helps a model of `blocks` most.

    That is where the weakest block of the swarm is strongest afterwards; of such spans where the second weakest is, and
    so on, then the first. `records` are the other servers' that have not expired, of the same `quality`, since routes do not
    mix them; those that drain count as gone.

    Raises `InvalidSetting` for a capacity below one block.
    """
    if capacity < 1:
        raise InvalidSetting("capacity", f"{capacity} blocks are no span; give this server memory for at least one block")
    length = min(capacity, blocks)
    return _best(strengths(_staying(records), blocks), length, throughput / length)


def should_move(records: Iterable[ServerRecord], me: ServerRecord, *, now: float, capacity: int, factor: float = 1.1) -> Span | None:
    """The span that the server of the record `me` should hold instead of its own, or None to stay.

    `records` are the swarm's as this server knows them, `now` is Unix time. Servers of another `quality` do not count. A move
    has to pay:

    - While blocks lack a holder, it must close more gaps than it opens, or be part of shifting along (see `mended`). Servers
      that drain count as staying as long as nobody holds some block, so that all judge by the same spans, and as gone otherwise.
      Of servers that drain to go to the same span the one of the lowest id goes.
    - Otherwise the blocks it leaves must, without this server, still be `factor` times as strong as those it goes to are
      now; moves one at a time then come to an end, for each makes the weakest blocks that it touches stronger.
    - In a swarm that is whole, the only ready holder of a block stays, whatever else would pay.

    Leaving takes two steps. A server that is told to move while "ready" says "draining" in its record, waits until that has
    spread and its sessions have gone, and asks again: "draining" it is told only while no step is under way, and not if
    all other holders of a block have meanwhile begun to drain too.
    """
    if me.state == "draining" and me.active:
        return None
    mine = quality(me)
    present = [record for record in _alive(records, now) if record.peer != me.peer and quality(record) == mine]
    staying = _staying(present)
    if all(coverage([*staying, me], me.blocks)):
        target = _strengthening(staying, me, capacity, factor)
    elif all(coverage([*present, me], me.blocks)):
        target = _closing(staying, me, capacity)  # ahead of those that drain, by a server that can be spared
    else:
        target = _closing(present, me, capacity)
        return None if _yields(present, me, target) else target
    if target is None:
        return None
    ready = coverage((record for record in staying if record.state == "ready"), me.blocks)
    return target if all(ready[me.start : me.end]) else None


def _closing(others: list[ServerRecord], me: ServerRecord, capacity: int) -> Span | None:
    """The span that closes more gaps among the others' than leaving opens, else this server's part in shifting along."""
    holders = coverage(others, me.blocks)
    length = min(capacity, me.blocks)
    target = _best(strengths(others, me.blocks), length, me.throughput / length)
    if holders[target.start : target.end].count(0) > holders[me.start : me.end].count(0):
        return target
    place = mended([*others, me], me.blocks).get(me.peer, me.span)
    return place if place != me.span else None


def _yields(others: list[ServerRecord], me: ServerRecord, target: Span | None) -> bool:
    """Whether another server that drains goes to the gap: of those that would take the same span, that of the lowest id."""

    def goes_there(other: ServerRecord) -> bool:
        rest = [record for record in (*others, me) if record.peer != other.peer]
        return _closing(rest, other, len(other.span)) == target

    draining = [other for other in others if other.state == "draining" and other.peer < me.peer]
    return me.state == "draining" and any(goes_there(other) for other in draining)


def _strengthening(others: list[ServerRecord], me: ServerRecord, capacity: int, factor: float) -> Span | None:
    """The span whose gain is worth the move; None where there is none."""
    without = strengths(others, me.blocks)
    held = range(me.start, me.end)
    share = me.throughput / len(held)
    before = [strength + share if block in held else strength for block, strength in enumerate(without)]
    if max(without[held[0]], without[held[-1]]) < factor * min(before):
        return None  # neither end of this span can be spared: the common case, found without looking at every window
    length = min(capacity, me.blocks)
    target = _best(without, length, me.throughput / length)
    gained = [block for block in range(target.start, target.end) if block not in held]
    lost = [block for block in held if not target.start <= block < target.end]
    pays = gained and lost and min(without[block] for block in lost) >= factor * min(before[block] for block in gained)
    return target if pays else None


def mended(records: Iterable[ServerRecord], blocks: int) -> dict[str, Span]:
    """Spans by peer, as long as the records' and in the same order, that hold every block; empty where they are too short.

    First servers close gaps before them, from the left; what then lacks at the end is closed from the right. A server whose
    place nobody needs changed keeps it, so while servers move there one by one, the others come to the same plan.
    """
    spans = {record.peer: record.span for record in records}
    covered = 0
    for peer, span in sorted(spans.items(), key=lambda item: (item[1], item[0])):
        start = min(span.start, covered)
        spans[peer] = Span(start, start + len(span))
        covered = max(covered, spans[peer].end)
    if covered >= blocks:
        return spans
    lacking = blocks
    for peer, span in sorted(spans.items(), key=lambda item: (item[1].end, item[1].start, item[0]), reverse=True):
        if lacking <= 0:
            break
        end = max(span.end, lacking)
        spans[peer] = Span(end - len(span), end)
        lacking = min(lacking, end - len(span))
    return spans if lacking <= 0 else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePolicy:
    """When a server moves; times in seconds.

    `pace` is the time between moves that a swarm should make for one and the same reason: longer than a record takes to
    spread, so that the next server sees the move before. `settle` is how long a server drains at least.
    """

    factor: float = 1.1
    pace: float = 20.0
    settle: float = 20.0


class Mover:
    """One server's decision to move: want, wait, drain, look again, move. Asked every few seconds.

    The wait is drawn from a generator of `seed`, up to `pace` times the servers that may want the same move, so that however
    many want it about one moves in each `pace`, and two whose moves would undo each other do not make them at once for ever.
    """

    def __init__(self, seed: int, policy: MovePolicy | None = None) -> None:
        self._policy = policy or MovePolicy()
        self._random = random.Random(seed)
        self._due: float | None = None
        self._drained: float | None = None

    @property
    def draining(self) -> bool:
        """Whether the server's record should say "draining"; when this ends without a move, "ready" again."""
        return self._drained is not None

    def consider(self, records: Sequence[ServerRecord], me: ServerRecord, *, now: float, capacity: int) -> Span | None:
        """The span to load now in place of the one held, or None. `me` says in its `state` what was published of `draining`."""
        idle = msgspec.structs.replace(me, active=0)
        target = should_move(records, idle, now=now, capacity=capacity, factor=self._policy.factor)
        if self._drained is not None:
            if target is not None and (me.active or now < self._drained + self._policy.settle):
                return None
            self._drained = None
            return target
        if target is None:
            self._due = None
        elif self._due is None:
            self._due = now + self._random.uniform(0, self._policy.pace * _rivals(records, me, now, self._policy.factor))
        elif now >= self._due:
            self._due, self._drained = None, now
        return None


def _alive(records: Iterable[ServerRecord], now: float) -> list[ServerRecord]:
    return [record for record in records if record.expires > now and record.throughput > 0]


def _staying(records: Iterable[ServerRecord]) -> list[ServerRecord]:
    return [record for record in records if record.state != "draining" and record.throughput > 0]


def _best(strength: Sequence[float], length: int, share: float) -> Span:
    """The first of the spans of `length` after whose gain of `share` the sorted strengths are the greatest."""
    rounded = [round(value, 6) for value in strength]  # equal however they were summed
    stronger = [value + share for value in rounded]

    def after(start: int) -> list[float]:
        return sorted(rounded[:start] + stronger[start : start + length] + rounded[start + length :])

    start = max(range(len(rounded) - length + 1), key=lambda start: (after(start), -start))
    return Span(start, start + length)


def _rivals(records: Iterable[ServerRecord], me: ServerRecord, now: float, factor: float) -> int:
    """About how many servers, `me` among them, may want to move for the same reason."""
    staying = [record for record in _staying(_alive(records, now)) if quality(record) == quality(me)]
    holders = coverage(staying, me.blocks)
    strength = strengths(staying, me.blocks)
    weakest = min(strength)

    def may(record: ServerRecord) -> bool:
        span = slice(record.start, record.end)
        spare = max(strength[span]) - record.throughput / (record.end - record.start)
        return min(holders[span]) > 1 and spare >= factor * weakest

    return max(min(len(staying), _FEW), sum(map(may, staying)))
