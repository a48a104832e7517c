"""A server's engine: one loop of receive, schedule, forward, reply.

Continuous batching after Orca (Yu et al., 2022), paged KV cache after vLLM (Kwon et al., 2023).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass

import torch

from corolla.engine.cache import KVCache
from corolla.engine.executor import INVARIANT_ROWS, Executor
from corolla.engine.pages import PagePool
from corolla.engine.sampler import Sampled, SampleRequest, check_vocabulary, sample
from corolla.engine.scheduler import Scheduler
from corolla.engine.sequence import Conversation, Deliver
from corolla.engine.work import Computed, Work
from corolla.errors import Busy, CapacityError, CorollaError, EmptyPrompt, InvalidSetting, PromptTooLong, ServerFault
from corolla.models.span import SpanModel
from corolla.types import Cached, Cancel, Close, Failed, FinishReason, Gap, Hidden, Message, Reply, Span, Step, Token


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    cache_tokens: int = 32768  # positions in the pool; memory is taken as they are first used
    page_size: int = 32
    step_rows: int = 256  # rows of one forward: larger prefills faster, smaller lets others decode in between
    max_active: int = 256  # sessions with a step under way; one more is Busy
    retry_after: float = 1.0  # seconds, told to who is turned away
    batch_invariant: bool = False  # the same bits whatever shares the batch, at the cost that docs/performance.md shows


@dataclass(slots=True)
class Counters:
    """What happened since the engine was made."""

    steps: int = 0
    rows: int = 0  # tokens computed
    reused: int = 0  # tokens found in the cache of earlier sessions
    sampled: int = 0
    gaps: int = 0
    evicted_idle: int = 0
    evicted_running: int = 0


class Engine:
    """Serves sessions on one span.

    `receive` and the callbacks are the whole interface: replies are delivered on the engine's thread, so a callback must
    return quickly and must not call `run_once`. Without `start`, call `run_once` yourself (tests do).
    """

    def __init__(self, model: SpanModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config = config or EngineConfig()
        pages = math.ceil(config.cache_tokens / config.page_size)
        self.pool = PagePool(pages, config.page_size)
        self.cache = KVCache(model.arch, model.span, pages * config.page_size, config.page_size, model.dtype, model.device)
        self._executor = Executor(model, self.cache, batch_invariant=config.batch_invariant)
        rows = INVARIANT_ROWS if config.batch_invariant else config.step_rows
        self._scheduler = Scheduler(self.pool, rows)
        self._conversations: dict[str, Conversation] = {}
        self.counters = Counters()
        self._inbox: deque[tuple[Message, Deliver | None]] = deque()
        self._arrivals = 0
        self._awake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def context_length(self) -> int:
        """Tokens that a session can hold here."""
        return min(self.model.arch.context_length, self.pool.num_pages * self.pool.page_size)

    @property
    def active(self) -> int:
        """Sessions with a step under way, those that wait to be received among them."""
        return sum(not c.idle for c in list(self._conversations.values())) + len(self._inbox)

    # Receive.

    def receive(self, message: Message, deliver: Deliver | None = None) -> None:
        """Take a message, from any thread; what comes of a `Step` goes to `deliver`.

        Raises:
            Busy: too many sessions have a step under way.
            EmptyPrompt, PromptTooLong, InvalidSetting: the step can never be computed.
        """
        if isinstance(message, Step):
            self._check(message)
            if self.active >= self.config.max_active:
                raise Busy(self.config.retry_after)
        self._inbox.append((message, deliver))
        self._awake.set()

    def _check(self, step: Step) -> None:
        arch, count = self.model.arch, len(step.payload)
        if count == 0:
            raise EmptyPrompt
        if step.start < 0:
            raise InvalidSetting("start", f"{step.start} is no position")
        room = self.context_length - (step.settings is not None)
        if step.start + count > room:
            raise PromptTooLong(step.start + count, self.context_length)
        span, own = step.span or self.model.span, self.model.span
        if not own.start <= span.start < span.end <= own.end:
            raise InvalidSetting("blocks", f"{span} are not among the blocks {own} held here")
        if span.start == 0:
            outside = next((token for token in step.payload if not 0 <= token < arch.vocabulary), None)
            if outside is not None:
                raise InvalidSetting("payload", f"{outside} is no token of a vocabulary of {arch.vocabulary}")
        elif not isinstance(step.payload, torch.Tensor) or step.payload.shape != (count, arch.hidden):
            raise InvalidSetting("payload", f"block {span.start} takes hidden states of shape [tokens, {arch.hidden}]")
        if step.settings is not None:
            check_vocabulary(step.settings, arch.vocabulary)

    def _take(self, message: Message, deliver: Deliver | None) -> None:
        known = self._conversations.get(message.session)
        if isinstance(message, Close):
            if known is not None:
                self._forget(known)
        elif isinstance(message, Cancel):
            if known is not None and known.generation == message.generation:
                self._rest(known)
        else:
            assert deliver is not None, "a step needs somewhere to send its replies"
            self._begin(message, deliver)

    def _begin(self, step: Step, deliver: Deliver) -> None:
        conversation = self._conversations.get(step.session)
        if conversation is not None and self._continues(conversation, step, deliver):
            return
        span = step.span or self.model.span
        if conversation is not None and (conversation.table.adapter, conversation.span) != (step.adapter, span):
            self._forget(conversation)
            conversation = None
        have = conversation.position if conversation is not None else 0
        if have < step.start:
            self.counters.gaps += 1
            if conversation is not None:
                self._rest(conversation)
            deliver(Gap(step.session, step.generation, have))
            return
        if conversation is None:
            # In a row of several servers each would find another length of a prefix: only a whole model shares them.
            whole = len(span) == self.model.arch.blocks
            conversation = Conversation(step.session, self.pool.open(step.adapter), span, shares_prefixes=whole)
            self._conversations[step.session] = conversation
        self.cache.copy_pages(self.pool.truncate(conversation.table, step.start))
        # A page that could not be copied is cut off: its tokens are still known, and are computed again.
        if isinstance(step.payload, torch.Tensor):
            if conversation.position < step.start:
                deliver(Gap(step.session, step.generation, conversation.position))
                return
            conversation.hidden = step.payload
            conversation.tokens[step.start :] = step.tokens
        else:
            conversation.hidden = None
            conversation.tokens[step.start :] = step.payload
        self._arrivals += 1
        conversation.deliver, conversation.settings = deliver, step.settings
        conversation.generation, conversation.sampled, conversation.arrival = step.generation, 0, self._arrivals

    def _continues(self, conversation: Conversation, step: Step, deliver: Deliver) -> bool:
        """A chunk of hidden states that follows one still waiting here: take it behind that."""
        waiting = conversation.hidden
        follows = step.generation == conversation.generation and step.start == conversation.position + conversation.pending
        if waiting is None or not follows or not isinstance(step.payload, torch.Tensor):
            return False
        conversation.hidden = torch.cat([waiting, step.payload])
        conversation.tokens[step.start :] = step.tokens
        conversation.settings, conversation.deliver = step.settings, deliver
        return True

    def _rest(self, conversation: Conversation) -> None:
        """Idle from here on: what is cached stays, what was pending is dropped."""
        conversation.deliver = conversation.settings = conversation.hidden = None
        del conversation.tokens[conversation.position :]
        self.pool.truncate(conversation.table, conversation.position)

    def _forget(self, conversation: Conversation) -> None:
        self.pool.free(conversation.table)
        del self._conversations[conversation.session]

    # The loop.

    def run_once(self) -> bool:
        """One turn: receive, schedule, forward, reply. False when there was nothing to compute."""
        while self._inbox:
            self._take(*self._inbox.popleft())
        scheduled = self._schedule()
        if not scheduled:
            return self._fail_stuck()
        self.counters.steps += 1
        for span in sorted({conversation.span for conversation, _ in scheduled}):
            self._forward(span, [(conversation, work) for conversation, work in scheduled if conversation.span == span])
        return True

    def _forward(self, span: Span, scheduled: list[tuple[Conversation, Work]]) -> None:
        """Forward and reply for the sessions that go through the same blocks."""
        try:
            computed = self._executor.forward([work for _, work in scheduled], span)
            sampled = iter(self._sample(scheduled, computed))
        except (CorollaError, RuntimeError, MemoryError) as error:
            self._fail([c for c, _ in scheduled], error)
            return
        at = 0
        for conversation, work in scheduled:
            hidden = computed.hidden[at : at + work.rows.count]
            at += work.rows.count
            self._reply(conversation, work, hidden, next(sampled) if work.wants_logits else None)

    def _schedule(self) -> list[tuple[Conversation, Work]]:
        schedule = self._scheduler.schedule(self._conversations.values())
        self.counters.reused += schedule.reused
        self.counters.evicted_idle += len(schedule.evicted)
        self.counters.evicted_running += len(schedule.set_back)
        for conversation in schedule.evicted:
            self._forget(conversation)
        for conversation in schedule.set_back:
            deliver = conversation.deliver
            # What came as hidden states only its sender can give again; tokens are known here.
            if conversation.hidden is not None and deliver is not None:
                self._forget(conversation)
                deliver(Gap(conversation.session, conversation.generation, 0))
        return schedule.work

    def _sample(self, scheduled: list[tuple[Conversation, Work]], computed: Computed) -> list[Sampled]:
        if computed.logits is None:
            return []
        requests = [
            SampleRequest(settings=c.settings, position=work.rows.end, history=c.tokens)
            for c, work in scheduled
            if work.wants_logits and c.settings is not None
        ]
        return sample(computed.logits, requests)

    # Reply.

    def _reply(self, conversation: Conversation, work: Work, hidden: torch.Tensor, sampled: Sampled | None) -> None:
        count = work.rows.count
        self.counters.rows += count
        conversation.used = self.counters.steps
        self.pool.advance(conversation.table, count)
        if conversation.hidden is not None:
            conversation.hidden = conversation.hidden[count:]
        elif conversation.shares_prefixes:
            self.pool.publish(conversation.table, conversation.tokens, conversation.position)
        deliver = conversation.deliver
        assert deliver is not None, "an idle session was scheduled"
        if sampled is not None:
            deliver(self._token(conversation, sampled))
            return
        done = conversation.pending == 0
        reply: Reply | None = None
        if conversation.span.end != self.model.arch.blocks:
            tokens = tuple(conversation.tokens[work.rows.start : work.rows.end])
            reply = Hidden(conversation.session, conversation.generation, work.rows.start, hidden, tokens, last=done)
        elif done:
            reply = Cached(conversation.session, conversation.generation, conversation.position)
        if done:
            self._rest(conversation)
        if reply is not None:
            deliver(reply)

    def _token(self, conversation: Conversation, sampled: Sampled) -> Token:
        """The sampled token, which also becomes the next row to compute (the ring, in one process) unless the answer ends."""
        settings = conversation.settings
        assert settings is not None, "a token was sampled for a step without settings"
        self.counters.sampled += 1
        conversation.sampled += 1
        position = conversation.position
        finish = None
        if sampled.token_id in settings.stop_token_ids:
            finish = FinishReason.STOP
        elif conversation.sampled >= settings.max_tokens_to_generate or position + 1 >= self.context_length:
            finish = FinishReason.LENGTH
        token = Token(
            conversation.session,
            conversation.generation,
            position,
            sampled.token_id,
            sampled.logprob,
            sampled.top_logprobs,
            finish,
        )
        if finish is None and conversation.span.start == 0:
            conversation.tokens.append(sampled.token_id)
        else:
            self._rest(conversation)
        return token

    def _fail(self, conversations: list[Conversation], error: BaseException) -> None:
        """The step broke: its sessions' caches cannot be trusted; their clients hold the history."""
        fault = error if isinstance(error, CorollaError) else ServerFault(f"the forward failed: {error}")
        for conversation in conversations:
            deliver = conversation.deliver
            self._forget(conversation)
            if deliver is not None:
                deliver(Failed(conversation.session, conversation.generation, fault))

    def _fail_stuck(self) -> bool:
        """Nothing could be scheduled: a session under way is too large for the pool that the others left."""
        stuck = [c for c in self._conversations.values() if not c.idle]
        if stuck:
            self._fail(stuck, CapacityError("the KV cache has no room for this session", self.config.retry_after))
        return False

    # The thread.

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="corolla-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the step under way; sessions with one under way are told."""
        self._stopping = True
        self._awake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        reason: BaseException = ServerFault("the engine was stopped")
        try:
            while not self._stopping:
                self._awake.clear()
                if not self.run_once() and not self._inbox:
                    self._awake.wait()
        except BaseException as error:
            # A fault of the engine itself: nobody may wait for ever on a loop that is gone.
            reason = error
            raise
        finally:
            for message, deliver in self._inbox:
                if deliver is not None:
                    deliver(Failed(message.session, getattr(message, "generation", 0), ServerFault(str(reason))))
            self._fail([c for c in self._conversations.values() if not c.idle], reason)

    def check_integrity(self) -> None:
        """Raises `AssertionError` where the sessions and the pages disagree; call it between steps."""
        self.pool.check_integrity()
        for conversation in self._conversations.values():
            known = len(conversation.tokens)
            embeds = conversation.span.start == 0
            assert not embeds or conversation.position <= known, f"{conversation.session} caches more than its history"
            assert not (conversation.idle and conversation.pending), f"{conversation.session} is idle with rows to compute"
