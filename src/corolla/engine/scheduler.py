"""Which rows the next forward computes: first those of each session that decodes, its next one and guesses of what follows, then
chunks of prefill.

When the pages run out, the session that was idle longest is evicted, and then the one under way that asked last is set
back: it is computed again when pages are free. The rule of positions brings both back. All servers of a route go by the time of
asking, so no two sessions wait for one another, each on a server where the other one holds the pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from corolla.barrier import barrier
from corolla.engine.attention import Rows
from corolla.engine.clock import AwakeClock
from corolla.engine.pages import PagePool
from corolla.engine.sequence import Conversation
from corolla.engine.work import Work

_PART, _PARTS = 64, 8  # rows of a part of a prompt that goes on, about, and how many parts are made of what is left of it at most
_LOST_AFTER = 30.0  # seconds without the next token: whoever should send it is gone


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The rows of the next forward, and whose pages were taken for them."""

    work: list[tuple[Conversation, Work]] = field(default_factory=list)
    evicted: list[Conversation] = field(default_factory=list)  # were idle
    set_back: list[Conversation] = field(default_factory=list)  # are under way, and begin anew
    failed: list[tuple[Conversation, Exception]] = field(default_factory=list)  # could not be scheduled, for a reason nobody expected
    reused: int = 0  # tokens whose pages were found in the cache


class Scheduler:
    """Args: `step_rows`, the rows of one forward at most; decoding sessions come before prefill in it."""

    def __init__(self, pool: PagePool, step_rows: int, clock: AwakeClock) -> None:
        self._pool, self._step_rows, self._clock = pool, step_rows, clock

    def schedule(self, conversations: Iterable[Conversation]) -> Schedule:
        """Reserve pages and choose rows; what could not get pages waits for a later step."""
        everyone = list(conversations)
        running = sorted((c for c in everyone if not c.idle and c.pending), key=lambda c: c.arrival)
        decoding = [c for c in running if c.pending - c.drafts == 1]
        # Where more sessions decode than fit in a step, the longest unserved go first.
        decoding.sort(key=lambda c: c.used)
        prefilling = [c for c in running if c.pending - c.drafts > 1]
        taken: list[tuple[Conversation, int]] = []
        schedule = Schedule()
        budget, reused = self._step_rows, 0
        for conversation in decoding + prefilling:
            if not budget:
                break
            if conversation in schedule.set_back:
                continue
            errors: list[Exception] = []
            with barrier("scheduling a session", errors.append):
                self._keep_drafts_if_free(conversation, budget)
                if conversation.shares_prefixes and not conversation.table.pages and not conversation.scores:
                    reused += self._pool.match(conversation.table, conversation.tokens)
                count = min(_part(conversation), budget)
                if self._make_room(conversation, count, everyone, [c for c, _ in taken], schedule):
                    taken.append((conversation, count))
                    budget -= count
            schedule.failed.extend((conversation, error) for error in errors)
        work = [(c, self._work(c, count)) for c, count in taken]
        return replace(schedule, work=work, reused=reused)

    def _keep_drafts_if_free(self, conversation: Conversation, budget: int) -> None:
        """Guesses are computed in one forward with all that is certain, and take pages that nobody holds, or not at all."""
        if not conversation.drafts:
            return
        table, pending = conversation.table, conversation.pending
        fits = bool(table.pages) and pending <= min(_part(conversation), budget)
        if not (fits and self._pool.reserve(table, table.length + pending)):
            conversation.drop_drafts()

    def _make_room(
        self, conversation: Conversation, count: int, everyone: list[Conversation], keep: list[Conversation], schedule: Schedule
    ) -> bool:
        """Reserve pages for `count` more rows, taking them from others than `keep` where none is free."""
        table = conversation.table
        while not self._pool.reserve(table, table.length + count):
            holders = [c for c in everyone if c.table.pages and c is not conversation and c not in keep]
            lost = self._clock.now() - _LOST_AFTER
            idle = [c for c in holders if c.idle or (c.waiting and c.seen < lost)]
            later = [c for c in holders if c.arrival > conversation.arrival]
            if idle:
                victim = min(idle, key=lambda c: c.used)
                schedule.evicted.append(victim)
            elif later:
                victim = max(later, key=lambda c: c.arrival)
                schedule.set_back.append(victim)
            else:
                return False
            self._pool.free(victim.table)
        return True

    def _work(self, conversation: Conversation, count: int) -> Work:
        rows = Rows(conversation.table, conversation.position, count)
        last = count == conversation.pending
        return Work(rows, conversation.payload(count), logits=1 + conversation.drafts if last and conversation.samples else 0)


def _part(conversation: Conversation) -> int:
    """How many of the pending rows to compute at once.

    What goes on as hidden states goes in parts: the next server computes the first while the second is computed here. That is
    the pipelining of GPipe (Huang et al., 2019), with parts of a prompt for micro-batches.
    """
    if not conversation.gives_hidden:
        return conversation.pending
    return math.ceil(conversation.pending / min(_PARTS, max(1, round(conversation.pending / _PART))))
