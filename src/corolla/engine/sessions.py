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
from corolla.engine.sequence import Conversation, Deliver
from corolla.models.span import SpanModel
from corolla.types import Cancel, Close, Gap, Message, Step

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
        self._known: dict[str, Conversation] = {}
        self._arrivals = 0

    def __iter__(self) -> Iterator[Conversation]:
        return iter(list(self._known.values()))

    def get(self, session: str) -> Conversation | None:
        return self._known.get(session)

    def take(self, message: Message, deliver: Deliver | None) -> None:
        """What an admitted message says; a step's replies go to `deliver`."""
        known = self._known.get(message.session)
        if isinstance(message, Close):
            if known is not None and (message.generation is None or known.generation <= message.generation):
                self.forget(known)
        elif isinstance(message, Cancel):
            if known is not None and known.generation == message.generation:
                self.rest(known)
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

    def _settle(self, conversation: Conversation) -> None:
        if conversation.charged:
            self._ledger.give_back(conversation.client, conversation.charged)
            conversation.charged = 0

    def _bound_histories(self, client: str) -> None:
        """A client's idle sessions are forgotten, the longest unused first, where it has more tokens here than are remembered of one."""
        own = [c for c in self if c.client == client]
        tokens = sum(len(c.tokens) for c in own)
        for conversation in sorted((c for c in own if c.idle), key=lambda c: c.used):
            if tokens <= _TOKENS_PER_CLIENT:
                return
            tokens -= len(conversation.tokens)
            self.forget(conversation)

    def forget_unused(self) -> None:
        """Those that have been idle for an hour and hold no pages."""
        since = self._clock.now() - _UNUSED
        for conversation in self:
            if conversation.idle and not conversation.table.pages and conversation.seen < since:
                self.forget(conversation)

    def rest(self, conversation: Conversation) -> None:
        """Idle from here on: what is cached stays, what was pending is dropped."""
        conversation.deliver = conversation.settings = None
        self.wait(conversation)

    def wait(self, conversation: Conversation) -> None:
        """Nothing is left to compute, until something more comes."""
        self._settle(conversation)
        conversation.hidden = None
        conversation.drafts = 0
        del conversation.tokens[conversation.position :]
        self._pool.truncate(conversation.table, conversation.position)

    def forget(self, conversation: Conversation) -> None:
        if self._known.get(conversation.session) is conversation:
            del self._known[conversation.session]
        self._settle(conversation)
        self._pool.free(conversation.table)

    def check_integrity(self) -> None:
        """Raises `AssertionError` where a session contradicts itself."""
        for conversation in self:
            known = len(conversation.tokens)
            assert conversation.takes_hidden or conversation.position <= known, f"{conversation.session} caches more than its history"
            assert not (conversation.idle and conversation.pending), f"{conversation.session} is idle with rows to compute"
            assert conversation.drafts <= max(0, conversation.pending - 1), f"{conversation.session} guesses more than it has to compute"

    def _begin(self, step: Step, deliver: Deliver) -> None:
        conversation = self._known.get(step.session)
        if conversation is not None and _continues(conversation, step):
            self._go_on(conversation, step, deliver)
            return
        span = step.span or self._model.span
        takes_hidden = isinstance(step.payload, torch.Tensor)
        seed = page_seed(step, shared=self._share_prefixes)
        kind = seed, span, takes_hidden
        if conversation is not None and (conversation.table.adapter, conversation.span, conversation.takes_hidden) != kind:
            self.forget(conversation)
            conversation = None
        if conversation is not None and conversation.generation != step.generation:
            # From where the new generation begins, the cached rows and their tokens are of an older history.
            self._truncate(conversation, step.began_at)
        have = 0 if conversation is None else _usable(conversation, step)
        if have < step.start:
            self._refuse(conversation, step, have, deliver)
            return
        if conversation is None:
            # In a row of several servers each would find another length of a prefix: only a whole model shares them.
            whole = len(span) == self._model.arch.blocks and not takes_hidden
            conversation = Conversation(
                step.session,
                self._pool.open(seed),
                span,
                takes_hidden=takes_hidden,
                shares_prefixes=whole,
                adapter=step.adapter,
                prompt=step.prompt,
                client=step.client,
            )
            self._known[step.session] = conversation
        self._truncate(conversation, step.start)
        if isinstance(step.payload, torch.Tensor):
            # A page that could not be copied is cut off. Where token ids come in they are still known, and are computed again.
            if conversation.position < step.start:
                self._refuse(conversation, step, conversation.position, deliver)
                return
            conversation.hidden = step.payload
            conversation.tokens[step.start :] = step.tokens
        else:
            conversation.hidden = None
            conversation.tokens[step.start :] = step.payload
        if conversation.idle or conversation.generation != step.generation:
            self._arrivals += 1
            conversation.unscored = None
            conversation.generation, conversation.sampled = step.generation, 0
            conversation.arrival = _asked(step), self._arrivals
            conversation.gives_hidden = step.wants_hidden or span.end != self._model.arch.blocks
        self._go_on(conversation, step, deliver)

    def _go_on(self, conversation: Conversation, step: Step, deliver: Deliver) -> None:
        conversation.deliver, conversation.settings, conversation.more = deliver, step.settings, step.more
        conversation.drafts, conversation.refuted = step.drafts, 0
        conversation.seen = self._clock.now()

    def _truncate(self, conversation: Conversation, position: int) -> None:
        """Keep what is cached below `position`; less where the last page is shared and no page is free for a copy of it."""
        self._cache.copy_pages(self._pool.truncate(conversation.table, min(position, conversation.position)))

    def _refuse(self, conversation: Conversation | None, step: Step, have: int, deliver: Deliver) -> None:
        """The step begins behind what is here. Its generation has taken no row, and begins anew where the caller sends again."""
        self._counters.gaps += 1
        if conversation is not None:
            self.rest(conversation)
            conversation.generation = step.generation
        deliver(Gap(step.session, step.generation, have))


def _usable(conversation: Conversation, step: Step) -> int:
    """How many of the cached rows the step can go on from: those whose token ids are known, where it brings ids of its own."""
    return min(conversation.position, len(conversation.tokens)) if step.tokens else conversation.position


def _asked(step: Step) -> int:
    """When the answer was asked for, in unix milliseconds; a claim is believed as far as a session may have moved to this server since."""
    now = int(time.time() * 1000)
    return min(max(step.asked, now - _MOVED_WITHIN), now) if step.asked else now


def _continues(conversation: Conversation, step: Step) -> bool:
    """Take a further chunk of a step whose rows are not all computed yet behind them; whether it is one."""
    follows = step.generation == conversation.generation and step.start == conversation.position + conversation.pending
    if not follows or not conversation.pending or isinstance(step.payload, torch.Tensor) != conversation.takes_hidden:
        return False
    if not isinstance(step.payload, torch.Tensor):
        conversation.tokens += step.payload
        return True
    if step.tokens and len(conversation.tokens) < step.start:  # the ids of rows before it are not known
        return False
    assert conversation.hidden is not None, "rows are pending that nobody sent"
    conversation.hidden = torch.cat([conversation.hidden, step.payload])
    conversation.tokens[step.start :] = step.tokens
    return True
