"""Which rows the next forward computes: first those of each session that decodes, its next one and guesses of what follows, then
chunks of prefill.

Clients share a forward and the pages. In a step each client's sessions take turns with those of the others, and while several
clients have sessions under way, each has a few rows of a step: a token of one takes about as long as the few rows of all.

When the pages run out, an idle session of a client with more than its share of them is evicted, the longest unused first. Then a
session under way is preempted: it is computed again when pages are free. The rule of positions brings both back.

Who is preempted for whom: the earliest sessions of a client, as far as they fit its equal share of the pages, are never preempted for
another client's; they preempt what does not fit its own client's share. A session that was preempted counts with the pages it had.
Among those that fit no share, and among the sessions of one client, the one that was asked for last is preempted. So no two sessions
preempt one another in turn: what fits changes only as clients come and go, and as sessions grow out of their share, and the order of
asking does not change. Servers of one route may differ in what fits. Where each of two sessions then waits on one server for pages
that the other holds there, neither sends anything to the servers behind: after `_LOST_AFTER` seconds its pages there are free, and
the other one goes on.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from corolla.barrier import barrier
from corolla.engine.attention import SequenceRows
from corolla.engine.batch import ScheduledSequence
from corolla.engine.clock import AwakeClock
from corolla.engine.page_pool import PagePool
from corolla.engine.sequence import Sequence

_PART, _PARTS = 64, 8  # rows of a part of a prompt that goes on, about, and how many parts are made of what is left of it at most
_LOST_AFTER = 30.0  # seconds without the next token: whoever should send it is gone
# Rows of a step that each of several clients has: with 8 beside it a row of SmolLM2 takes twice as long, with 256 beside it 15 times.
_SHARE = 8
_SHARE_BESIDE_WAITING = 32  # where the others' next tokens are on their way
_REMEMBERED = 1024  # sessions that were preempted
_EXPECTED_WITHIN = 0.5  # seconds: who is silent for longer than that is not waited for


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The rows of the next forward, and whose pages were taken for them."""

    work: list[tuple[Sequence, ScheduledSequence]] = field(default_factory=list)
    evicted: list[Sequence] = field(default_factory=list)  # were idle
    preempted: list[Sequence] = field(default_factory=list)  # are under way, and begin anew
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)  # could not be scheduled, for a reason nobody expected
    running: Counter[str] = field(default_factory=Counter)  # sessions that had rows to compute, by client
    reused: int = 0  # tokens whose pages were found in the cache


class Scheduler:
    """Args: `step_rows`, the rows of one forward at most; decoding sessions come before prefill in it."""

    def __init__(self, pool: PagePool, step_rows: int, clock: AwakeClock) -> None:
        self._pool, self._step_rows, self._clock = pool, step_rows, clock
        self._owed: Counter[str] = Counter()  # rows that a client had beyond its share of the steps
        self._outgrown: OrderedDict[str, int] = OrderedDict()  # pages that sessions held when they were preempted last

    def schedule(self, sequences: Iterable[Sequence]) -> Schedule:
        """Reserve pages and choose rows; what could not get pages waits for a later step."""
        everyone = list(sequences)
        running = sorted((c for c in everyone if not c.idle and c.pending), key=lambda c: c.arrival)
        decoding = [c for c in running if c.pending - c.drafts == 1]
        # Where more sessions decode than fit in a step, the longest unserved go first.
        decoding.sort(key=lambda c: c.used)
        prefilling = [c for c in running if c.pending - c.drafts > 1]
        rows_of = self._rows_of_clients(everyone, running)
        taken: dict[Sequence, int] = {}
        schedule = Schedule()
        budget, reused = self._step_rows, 0
        for sequence in _in_turn(decoding + prefilling):
            most = min(budget, rows_of.get(sequence.client, budget))
            if not most or sequence in schedule.preempted:
                continue
            errors: list[Exception] = []
            with barrier("scheduling a session", errors.append):
                self._keep_drafts_if_free(sequence, most)
                if sequence.shares_prefixes and not sequence.table.pages and not sequence.scores:
                    reused += self._pool.match(sequence.table, sequence.tokens)
                count = min(_part(sequence), most)
                if self._make_room(sequence, count, everyone, taken, schedule):
                    taken[sequence] = count
                    budget -= count
                    if rows_of:
                        rows_of[sequence.client] -= count
            schedule.failed.extend((sequence, error) for error in errors)
        if rows_of:
            for sequence, count in taken.items():
                self._owed[sequence.client] += count
        work = [(c, self._work(c, count)) for c, count in taken.items()]
        return replace(schedule, work=work, running=Counter(c.client for c in running), reused=reused)

    def _rows_of_clients(self, everyone: list[Sequence], running: list[Sequence]) -> Counter[str]:
        """How many rows of a step each client may have; nothing where there is one client only.

        A client that had less than its share of the last steps may have it now, up to half a step: most prompts are computed at once.
        """
        expected = self._clock.now() - _EXPECTED_WITHIN if len(everyone) > 1 else 0.0
        busy = {c.client for c in running}
        clients = busy | {c.client for c in everyone if c.waiting and c.seen > expected} if len(everyone) > 1 else busy
        if len(clients) < 2:
            self._owed.clear()
            return Counter()
        share = _SHARE if len(busy) > 1 else _SHARE_BESIDE_WAITING
        self._owed = Counter({client: rows - share for client, rows in self._owed.items() if rows > share})
        return Counter({client: max(share, self._step_rows // 2 - self._owed[client]) for client in clients})

    def _keep_drafts_if_free(self, sequence: Sequence, budget: int) -> None:
        """Guesses are computed in one forward with all that is certain, and take pages that nobody holds, or not at all."""
        if not sequence.drafts:
            return
        table, pending = sequence.table, sequence.pending
        fits = bool(table.pages) and pending <= min(_part(sequence), budget)
        if not (fits and self._pool.reserve(table, table.length + pending)):
            sequence.drop_drafts()

    def _make_room(self, sequence: Sequence, count: int, everyone: list[Sequence], taken: dict[Sequence, int], schedule: Schedule) -> bool:
        """Reserve pages for `count` more rows, where none is free those of others."""
        table = sequence.table
        while not self._pool.reserve(table, table.length + count):
            holders = [c for c in everyone if c.table.pages and c is not sequence]
            if (victim := self._idle_victim(sequence, holders)) is not None:
                schedule.evicted.append(victim)
            elif (victim := self._running_victim(sequence, holders, everyone, taken)) is not None:
                schedule.preempted.append(victim)
                taken.pop(victim, None)
                self._remember(victim)
            else:
                return False
            self._pool.free(victim.table)
        return True

    def _idle_victim(self, sequence: Sequence, holders: list[Sequence]) -> Sequence | None:
        """The longest unused session that is idle, or whose next token does not come; of the client itself, of one that holds more than
        its share, or, for one that holds less, of anybody."""
        lost = self._clock.now() - _LOST_AFTER
        idle = [c for c in holders if c.idle or (c.waiting and c.seen < lost)]
        pages = Counter({sequence.client: len(sequence.table.pages)})
        for other in holders:
            pages[other.client] += len(other.table.pages)
        share = self._pool.num_pages / len(pages)
        near = [c for c in idle if c.client == sequence.client or pages[c.client] > share]
        if not near and pages[sequence.client] <= share:
            near = idle
        return min(near, key=lambda c: c.used, default=None)

    def _running_victim(
        self, sequence: Sequence, holders: list[Sequence], everyone: list[Sequence], taken: dict[Sequence, int]
    ) -> Sequence | None:
        """The session under way that was asked for last, of those that are preempted for this one."""
        fitting = self._fitting(everyone)

        def preempted(other: Sequence) -> bool:
            if sequence.client != other.client and sequence in fitting:
                return other not in fitting
            alike = sequence.client == other.client or other not in fitting
            return alike and other.arrival > sequence.arrival and other not in taken

        return max((c for c in holders if not c.idle and preempted(c)), key=lambda c: c.arrival, default=None)

    def _fitting(self, everyone: list[Sequence]) -> set[Sequence]:
        """The sessions under way that fit their client's share of the pages with all that is known of them, the earliest first."""
        running = sorted((c for c in everyone if not c.idle), key=lambda c: c.arrival)
        share = self._pool.num_pages // max(1, len({c.client for c in running}))
        needed: Counter[str] = Counter()
        fitting = set()
        for sequence in running:
            pages = -(-(sequence.position + sequence.pending) // self._pool.page_size)
            needed[sequence.client] += max(pages, self._outgrown.get(sequence.session, 0))
            if needed[sequence.client] <= share:
                fitting.add(sequence)
        return fitting

    def _remember(self, victim: Sequence) -> None:
        """Its rows come again bit by bit on a server in the middle of a route: it is known by then how many they will be."""
        self._outgrown[victim.session] = max(len(victim.table.pages), self._outgrown.pop(victim.session, 0))
        if len(self._outgrown) > _REMEMBERED:
            self._outgrown.popitem(last=False)

    def _work(self, sequence: Sequence, count: int) -> ScheduledSequence:
        rows = SequenceRows(sequence.table, sequence.position, count)
        last = count == sequence.pending
        return ScheduledSequence(rows, sequence.payload(count), logits=1 + sequence.drafts if last and sequence.samples else 0)


def _in_turn(sessions: list[Sequence]) -> list[Sequence]:
    """One session of each client, then a second one of each, and so on, else in the order given."""
    places: Counter[str] = Counter()
    placed = []
    for sequence in sessions:
        placed.append((places[sequence.client], sequence))
        places[sequence.client] += 1
    return [sequence for _, sequence in sorted(placed, key=lambda both: both[0])]


def _part(sequence: Sequence) -> int:
    """How many of the pending rows to compute at once.

    What goes on as hidden states goes in parts: the next server computes the first while the second is computed here. That is
    the pipelining of GPipe (Huang et al., 2019), with parts of a prompt for micro-batches.
    """
    if not sequence.gives_hidden:
        return sequence.pending
    return math.ceil(sequence.pending / min(_PARTS, max(1, round(sequence.pending / _PART))))
