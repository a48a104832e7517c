"""The sessions that an engine knows, and the rule of positions: a step truncates what is cached beyond its start, or meets a gap."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from corolla.engine.budgets import Ledger
from corolla.engine.clock import AwakeClock
from corolla.engine.counters import EngineCounters
from corolla.engine.inbox import size_of
from corolla.engine.kv_cache import KVCache
from corolla.engine.page_pool import PagePool
from corolla.engine.prompts import page_seed
from corolla.engine.sequence import Deliver, Sequence
from corolla.messages import Cancel, Close, Gap, Message
from corolla.models.span import SpanModel
from corolla.types import Step

_FEW = 64  # rows of a step that lengthen no history by much
_TOKENS_PER_CLIENT = 2**19  # of all its sessions: 20 MB
_UNUSED = 3600.0  # seconds
_MOVED_WITHIN = 10_000  # milliseconds


class Sessions:
    """Changed on the engine's thread alone; iterated, looked up and counted on any."""

    def __init__(
        self,
        model: SpanModel,
        pool: PagePool,
        cache: KVCache,
        counters: EngineCounters,
        clock: AwakeClock,
        ledger: Ledger,
        *,
        share_prefixes: bool,
    ) -> None:
        self._model, self._pool, self._cache, self._counters, self._clock = model, pool, cache, counters, clock
        self._ledger, self._share_prefixes = ledger, share_prefixes
        self._known: dict[str, Sequence] = {}
        self._arrivals = 0

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._known.values()))

    def get(self, session: str) -> Sequence | None:
        return self._known.get(session)

    def take(self, message: Message, deliver: Deliver | None) -> None:
        """What an admitted message says; a step's replies go to `deliver`."""
        known = self._known.get(message.session)
        if isinstance(message, Close):
            if known is not None and (message.generation is None or known.generation <= message.generation):
                self.forget(known)
        elif isinstance(message, Cancel):
            if known is not None and known.generation == message.generation:
                self.finish(known)
        elif isinstance(message, Step):
            assert deliver is not None, "a step needs somewhere to send its replies"
            try:
                self._begin(message, deliver)
            finally:
                self._charge(message, deliver)

    def _charge(self, step: Step, deliver: Deliver) -> None:
        """What the inbox has charged for a step stays so until its session has nothing to compute."""
        known = self._known.get(step.session)
        if known is not None and known.deliver is deliver:
            known.charged += size_of(step)
            if len(step.payload) > _FEW:
                self._bound_histories(known.client)
        else:
            self._ledger.give_back(step.client, size_of(step))

    def _settle(self, sequence: Sequence) -> None:
        if sequence.charged:
            self._ledger.give_back(sequence.client, sequence.charged)
            sequence.charged = 0

    def _bound_histories(self, client: str) -> None:
        """A client's idle sessions are forgotten, the longest unused first, where it has more tokens here than are remembered of one."""
        own = [c for c in self if c.client == client]
        tokens = sum(len(c.tokens) for c in own)
        for sequence in sorted((c for c in own if c.idle), key=lambda c: c.used):
            if tokens <= _TOKENS_PER_CLIENT:
                return
            tokens -= len(sequence.tokens)
            self.forget(sequence)

    def forget_unused(self) -> None:
        """Those that have been idle for an hour and hold no pages."""
        since = self._clock.now() - _UNUSED
        for sequence in self:
            if sequence.idle and not sequence.table.pages and sequence.seen < since:
                self.forget(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Idle from here on: what is cached stays, what was pending is dropped."""
        sequence.deliver = sequence.settings = None
        self.pause(sequence)

    def pause(self, sequence: Sequence) -> None:
        """Nothing is left to compute, until something more comes."""
        self._settle(sequence)
        sequence.hidden = None
        sequence.drafts = 0
        del sequence.tokens[sequence.position :]
        self._pool.truncate(sequence.table, sequence.position)

    def forget(self, sequence: Sequence) -> None:
        if self._known.get(sequence.session) is sequence:
            del self._known[sequence.session]
        self._settle(sequence)
        self._pool.free(sequence.table)

    def check_integrity(self) -> None:
        """Raises `AssertionError` where a session contradicts itself."""
        for sequence in self:
            known = len(sequence.tokens)
            assert sequence.takes_hidden or sequence.position <= known, f"{sequence.session} caches more than its history"
            assert not (sequence.idle and sequence.pending), f"{sequence.session} is idle with rows to compute"
            assert sequence.drafts <= max(0, sequence.pending - 1), f"{sequence.session} guesses more than it has to compute"

    def _begin(self, step: Step, deliver: Deliver) -> None:
        sequence = self._known.get(step.session)
        if sequence is not None and _continues(sequence, step):
            self._go_on(sequence, step, deliver)
            return
        span = step.span or self._model.span
        takes_hidden = isinstance(step.payload, torch.Tensor)
        seed = page_seed(step, shared=self._share_prefixes)
        kind = seed, span, takes_hidden
        if sequence is not None and (sequence.table.adapter, sequence.span, sequence.takes_hidden) != kind:
            self.forget(sequence)
            sequence = None
        if sequence is not None and sequence.generation != step.generation:
            # From where the new generation begins, the cached rows and their tokens are of an older history.
            self._truncate(sequence, step.began_at)
        have = 0 if sequence is None else _usable(sequence, step)
        if have < step.start:
            self._refuse(sequence, step, have, deliver)
            return
        if sequence is None:
            # In a row of several servers each would find another length of a prefix: only a whole model shares them.
            whole = len(span) == self._model.arch.blocks and not takes_hidden
            sequence = Sequence(
                step.session,
                self._pool.open(seed),
                span,
                takes_hidden=takes_hidden,
                shares_prefixes=whole,
                adapter=step.adapter,
                prompt=step.prompt,
                client=step.client,
            )
            self._known[step.session] = sequence
        self._truncate(sequence, step.start)
        if isinstance(step.payload, torch.Tensor):
            # A page that could not be copied is cut off. Where token ids come in they are still known, and are computed again.
            if sequence.position < step.start:
                self._refuse(sequence, step, sequence.position, deliver)
                return
            sequence.hidden = step.payload
            sequence.tokens[step.start :] = step.tokens
        else:
            sequence.hidden = None
            sequence.tokens[step.start :] = step.payload
        if sequence.idle or sequence.generation != step.generation:
            self._arrivals += 1
            sequence.unscored = None
            sequence.generation, sequence.sampled = step.generation, 0
            sequence.arrival = _asked(step), self._arrivals
            sequence.gives_hidden = step.wants_hidden or span.end != self._model.arch.blocks
        self._go_on(sequence, step, deliver)

    def _go_on(self, sequence: Sequence, step: Step, deliver: Deliver) -> None:
        sequence.deliver, sequence.settings, sequence.more = deliver, step.settings, step.more
        sequence.drafts, sequence.rejected = step.drafts, 0
        sequence.seen = self._clock.now()

    def _truncate(self, sequence: Sequence, position: int) -> None:
        """Keep what is cached below `position`; less where the last page is shared and no page is free for a copy of it."""
        self._cache.copy_pages(self._pool.truncate(sequence.table, min(position, sequence.position)))

    def _refuse(self, sequence: Sequence | None, step: Step, have: int, deliver: Deliver) -> None:
        """The step begins behind what is here. Its generation has taken no row, and begins anew where the caller sends again."""
        self._counters.gaps += 1
        if sequence is not None:
            self.finish(sequence)
            sequence.generation = step.generation
        deliver(Gap(step.session, step.generation, have))


def _usable(sequence: Sequence, step: Step) -> int:
    """How many of the cached rows the step can go on from: those whose token ids are known, where it brings ids of its own."""
    return min(sequence.position, len(sequence.tokens)) if step.tokens else sequence.position


def _asked(step: Step) -> int:
    """When the answer was asked for, in unix milliseconds; a claim is believed as far as a session may have moved to this server since."""
    now = int(time.time() * 1000)
    return min(max(step.asked, now - _MOVED_WITHIN), now) if step.asked else now


def _continues(sequence: Sequence, step: Step) -> bool:
    """Take a further chunk of a step whose rows are not all computed yet behind them; whether it is one."""
    follows = step.generation == sequence.generation and step.start == sequence.position + sequence.pending
    if not follows or not sequence.pending or isinstance(step.payload, torch.Tensor) != sequence.takes_hidden:
        return False
    if not isinstance(step.payload, torch.Tensor):
        sequence.tokens += step.payload
        return True
    if step.tokens and len(sequence.tokens) < step.start:  # the ids of rows before it are not known
        return False
    assert sequence.hidden is not None, "rows are pending that nobody sent"
    sequence.hidden = torch.cat([sequence.hidden, step.payload])
    sequence.tokens[step.start :] = step.tokens
    return True
