"""A server's engine: one loop of receive, schedule, forward, reply.

Continuous batching after Orca (Yu et al., 2022), paged KV cache after vLLM (Kwon et al., 2023).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from corolla.engine.adapters import AdapterStore
from corolla.engine.cache import KVCache
from corolla.engine.executor import INVARIANT_ROWS, Executor
from corolla.engine.pages import PagePool
from corolla.engine.prompts import PromptStore, page_seed, rows_of
from corolla.engine.sampler import Sampled, SampleRequest, check_vocabulary, sample
from corolla.engine.scheduler import Scheduler
from corolla.engine.scores import scores_of
from corolla.engine.sequence import Conversation, Deliver
from corolla.engine.work import Computed, Work
from corolla.errors import (
    AdapterNeeded,
    Busy,
    CapacityError,
    CorollaError,
    EmptyPrompt,
    InvalidSetting,
    PromptNeeded,
    PromptTooLong,
    ServerFault,
)
from corolla.models.span import SpanModel
from corolla.types import (
    AdapterPart,
    Cached,
    Cancel,
    Close,
    Failed,
    FinishReason,
    Gap,
    Give,
    Hidden,
    Message,
    PromptPart,
    Reply,
    Span,
    Step,
    Token,
)

_LIGHT_ROWS = 32
_LINGER = 0.1  # of the last forward's time, until sessions that are expected back are waited for no longer
_LINGER_AT_MOST = 1e-3  # seconds
_LOOK_AGAIN = 5.0  # seconds: sessions may wait for the pages of one whose next token never comes


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    cache_tokens: int = 32768  # positions in the pool; memory is taken as they are first used
    page_size: int = 32
    step_rows: int = 256  # rows of one forward: larger prefills faster, smaller lets others decode in between
    max_active: int = 256  # sessions with a step under way; one more is Busy
    retry_after: float = 1.0  # seconds, told to who is turned away
    take_adapters: bool = True  # that clients send
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
    call_pieces: int = 0  # of forward and backward calls
    call_pieces_put_off: int = 0  # because sessions had steps to compute
    # Of forwards of few rows, which take about as long as one row does: how many, and the seconds that one block of them took.
    light_steps: int = 0
    light_seconds: float = 0.0


class Engine:
    """Serves sessions on one span. `after_turn` is called when the replies of a turn have been delivered.

    `receive` and the callbacks are the whole interface: replies are delivered on the engine's thread, so a callback must
    return quickly and must not call `run_once`. Without `start`, call `run_once` yourself (tests do).
    """

    def __init__(self, model: SpanModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config = config or EngineConfig()
        pages = math.ceil(config.cache_tokens / config.page_size)
        self.pool = PagePool(pages, config.page_size)
        self.cache = KVCache(model.arch, model.span, pages * config.page_size, config.page_size, model.dtype, model.device)
        self.prompts = PromptStore(model)
        self.adapters = AdapterStore(model, takes=config.take_adapters)
        self._executor = Executor(model, self.cache, batch_invariant=config.batch_invariant)
        rows = INVARIANT_ROWS if config.batch_invariant else config.step_rows
        self._scheduler = Scheduler(self.pool, rows)
        self._conversations: dict[str, Conversation] = {}
        self.counters = Counters()
        self.after_turn: Callable[[], None] = lambda: None
        self.forward_seconds = 0.0  # of the forward whose replies are being delivered
        self._inbox: deque[tuple[Message, Deliver | None]] = deque()
        self._calls: deque[tuple[Iterator[None], Callable[[], None]]] = deque()
        self._owed = 0.0  # seconds of sessions' steps until the next piece of a call
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
        """Sessions with a step or an answer under way, those that wait to be received among them."""
        return sum(not c.idle for c in list(self._conversations.values())) + len(self._inbox)

    @property
    def _computing(self) -> int:
        """The same without those that wait for their next token."""
        return sum(c.pending > 0 for c in list(self._conversations.values())) + len(self._inbox)

    @property
    def alive(self) -> bool:
        """Whether somebody computes what is received: false when the thread has ended."""
        return self._thread is None or self._thread.is_alive()

    @property
    def free_tokens(self) -> int:
        """Positions that a newcomer could have: in free pages, and in those of idle sessions."""
        idle = sum(len(c.table.pages) for c in list(self._conversations.values()) if c.idle)
        return min(self.pool.free_pages + idle, self.pool.num_pages) * self.pool.page_size

    def whereabouts(self, session: str, generation: int) -> tuple[int, int]:
        """Tokens of a session's generation that are cached here, and rows that are still to be computed."""
        waiting = sum(len(message.payload) for message, _ in list(self._inbox) if isinstance(message, Step) and message.session == session)
        known = self._conversations.get(session)
        if known is None or known.generation != generation:
            return 0, waiting
        return known.position, known.pending + waiting

    # Receive.

    def receive(self, message: Message, deliver: Deliver | None = None) -> None:
        """Take a message, from any thread; what comes of a `Step` goes to `deliver`.

        Raises:
            Busy: too many sessions have a step under way.
            EmptyPrompt, PromptTooLong, InvalidSetting: the step can never be computed.
            PromptNeeded, AdapterNeeded: the step's soft prompt or adapter has to be given first.
            NetworkError: its adapter is not here, and none are taken.
        """
        if isinstance(message, Step):
            self._check(message)
            known = self._conversations.get(message.session)
            if (known is None or known.idle) and self._computing >= self.config.max_active:
                raise Busy(self.config.retry_after)
        elif isinstance(message, Give):
            self._keep(message.part)
            return
        self._inbox.append((message, deliver))
        self._awake.set()

    def _keep(self, part: PromptPart | AdapterPart) -> None:
        """What somebody in this process gives: an adapter for good, as its memory is theirs, too."""
        if isinstance(part, AdapterPart):
            self.adapters.hold(part)
        else:
            self.prompts.put("", part)

    def call(self, job: Iterator[None], on_stop: Callable[[], None] = lambda: None) -> None:
        """Work for the engine's thread beside the sessions, from any thread: one `next` after each step, so that nobody's
        tokens wait for all of it. The job must not raise. `on_stop` is called if the engine ends before the job does."""
        self._calls.append((job, on_stop))
        if self._stopping and not self.alive:
            self._end_calls()
        self._awake.set()

    def _end_calls(self) -> None:
        with suppress(IndexError):  # of a deque that another thread has just emptied
            while True:
                self._calls.popleft()[1]()

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
        if isinstance(step.payload, torch.Tensor):
            if step.payload.shape != (count, arch.hidden):
                raise InvalidSetting("payload", f"hidden states come in the shape [tokens, {arch.hidden}]")
            if span.start == 0 and not step.wants_hidden:
                raise InvalidSetting("payload", "block 0 takes token ids, unless hidden states are wanted back")
        elif span.start == 0:
            outside = next((token for token in step.payload if not 0 <= token < arch.vocabulary), None)
            if outside is not None:
                raise InvalidSetting("payload", f"{outside} is no token of a vocabulary of {arch.vocabulary}")
        else:
            raise InvalidSetting("payload", f"block {span.start} takes hidden states of shape [tokens, {arch.hidden}]")
        if step.settings is not None:
            check_vocabulary(step.settings, arch.vocabulary)
        self.prompts.check(step, span)
        self.adapters.check(step, span)

    def _take(self, message: Message, deliver: Deliver | None) -> None:
        known = self._conversations.get(message.session)
        if isinstance(message, Close):
            if known is not None and (message.generation is None or known.generation <= message.generation):
                self._forget(known)
        elif isinstance(message, Cancel):
            if known is not None and known.generation == message.generation:
                self._rest(known)
        elif isinstance(message, Step):
            assert deliver is not None, "a step needs somewhere to send its replies"
            self._begin(message, deliver)

    def _begin(self, step: Step, deliver: Deliver) -> None:
        conversation = self._conversations.get(step.session)
        if conversation is not None and self._continues(conversation, step, deliver):
            return
        span = step.span or self.model.span
        takes_hidden = isinstance(step.payload, torch.Tensor)
        seed = page_seed(step)
        kind = seed, span, takes_hidden
        if conversation is not None and (conversation.table.adapter, conversation.span, conversation.takes_hidden) != kind:
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
            whole = len(span) == self.model.arch.blocks and not takes_hidden
            conversation = Conversation(
                step.session,
                self.pool.open(seed),
                span,
                takes_hidden=takes_hidden,
                shares_prefixes=whole,
                adapter=step.adapter,
                prompt=step.prompt,
                client=step.client,
            )
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
        if conversation.idle or conversation.generation != step.generation:
            self._arrivals += 1
            conversation.unscored = None
            conversation.generation, conversation.sampled, conversation.arrival = step.generation, 0, (step.asked, self._arrivals)
            conversation.gives_hidden = step.wants_hidden or span.end != self.model.arch.blocks
        conversation.deliver, conversation.settings, conversation.more = deliver, step.settings, step.more
        conversation.seen = time.monotonic()

    def _continues(self, conversation: Conversation, step: Step, deliver: Deliver) -> bool:
        """A chunk of hidden states that follows one still waiting here: take it behind that."""
        waiting = conversation.hidden
        follows = step.generation == conversation.generation and step.start == conversation.position + conversation.pending
        if waiting is None or not follows or not isinstance(step.payload, torch.Tensor):
            return False
        conversation.hidden = torch.cat([waiting, step.payload])
        conversation.tokens[step.start :] = step.tokens
        conversation.deliver, conversation.settings, conversation.more = deliver, step.settings, step.more
        conversation.seen = time.monotonic()
        return True

    def _rest(self, conversation: Conversation) -> None:
        """Idle from here on: what is cached stays, what was pending is dropped."""
        conversation.deliver = conversation.settings = None
        self._wait(conversation)

    def _wait(self, conversation: Conversation) -> None:
        """Nothing is left to compute, until something more comes."""
        conversation.hidden = None
        del conversation.tokens[conversation.position :]
        self.pool.truncate(conversation.table, conversation.position)

    def _forget(self, conversation: Conversation) -> None:
        self.pool.free(conversation.table)
        del self._conversations[conversation.session]

    # The loop.

    def run_once(self) -> bool:
        """One turn: receive, schedule, forward, reply, and a piece of the calls. False when there was nothing to compute."""
        while self._inbox:
            self._take(*self._inbox.popleft())
        scheduled = self._furnished(self._schedule())
        if scheduled:
            self.counters.steps += 1
        began = time.perf_counter()
        for span in sorted({conversation.span for conversation, _ in scheduled}):
            self._forward(span, [(conversation, work) for conversation, work in scheduled if conversation.span == span])
        called = self._advance_call(time.perf_counter() - began if scheduled else None)
        busy = bool(scheduled) or called or self._fail_stuck()
        self.after_turn()
        return busy

    def _advance_call(self, step_seconds: float | None) -> bool:
        """A piece of the oldest call, unless sessions have steps to compute (this turn's took so long) and the last piece took longer
        than their steps since: beside sessions, calls get half of the time."""
        if not self._calls:
            return False
        if step_seconds is not None:
            self._owed -= step_seconds
            if self._owed > 0:
                self.counters.call_pieces_put_off += 1
                return False
        began, ended = time.perf_counter(), object()
        if next(self._calls[0][0], ended) is ended:
            self._calls.popleft()
        self.counters.call_pieces += 1
        self._owed = time.perf_counter() - began
        return True

    def _forward(self, span: Span, scheduled: list[tuple[Conversation, Work]]) -> None:
        """Forward and reply for the sessions that go through the same blocks."""
        began = time.perf_counter()
        try:
            computed = self._executor.forward([work for _, work in scheduled], span)
            self._score(scheduled, computed)
            sampled = iter(self._sample(scheduled, computed))
        except (CorollaError, RuntimeError, MemoryError) as error:
            self._fail([c for c, _ in scheduled], error)
            return
        self.forward_seconds = time.perf_counter() - began
        if sum(work.rows.count for _, work in scheduled) <= _LIGHT_ROWS:
            self.counters.light_steps += 1
            self.counters.light_seconds += self.forward_seconds / len(span)
        at = 0
        for conversation, work in scheduled:
            hidden = computed.hidden[at : at + work.rows.count]
            at += work.rows.count
            token = next(sampled) if work.wants_logits else None
            if work.wants_logits and token is None:
                damaged = ServerFault("the logits hold NaN or infinity: the weights or the hidden states behind them are damaged")
                self._fail([conversation], damaged)
            else:
                self._reply(conversation, work, hidden, token)

    def _schedule(self) -> list[tuple[Conversation, Work]]:
        schedule = self._scheduler.schedule(self._conversations.values())
        self.counters.reused += schedule.reused
        self.counters.evicted_idle += len(schedule.evicted)
        self.counters.evicted_running += len(schedule.set_back)
        for conversation in schedule.evicted:
            self._forget(conversation)
        for conversation in schedule.set_back:
            deliver = conversation.deliver
            # A whole model computes the tokens again by itself; the servers of a route are all given them again.
            if len(conversation.span) < self.model.arch.blocks or conversation.takes_hidden:
                self._forget(conversation)
                assert deliver is not None, "an idle session was set back"
                deliver(Gap(conversation.session, conversation.generation, 0))
        return schedule.work

    def _furnished(self, scheduled: list[tuple[Conversation, Work]]) -> list[tuple[Conversation, Work]]:
        """With their adapters and what their soft prompts put in; those of whom something was forgotten meanwhile are told. The rows of
        one adapter lie together."""
        ready = []
        for conversation, work in scheduled:
            try:
                ready.append((conversation, self._furnish(conversation, work)))
            except (PromptNeeded, AdapterNeeded) as needed:
                self._fail([conversation], needed)
        return sorted(ready, key=lambda both: both[0].adapter)

    def _furnish(self, conversation: Conversation, work: Work) -> Work:
        name = conversation.prompt
        if name is not None and conversation.needs_prompt:
            part = self.prompts.find(conversation.client, name, conversation.span, with_input=conversation.puts_in)
            if part is None:
                raise PromptNeeded
            work = replace(work, prompt=rows_of(part, work.rows.start, work.rows.count))
        if conversation.adapter:
            adapter = self.adapters.find(conversation.adapter, conversation.span)
            if adapter is None:
                raise AdapterNeeded
            work = replace(work, adapter=adapter)
        return work

    def _score(self, scheduled: list[tuple[Conversation, Work]], computed: Computed) -> None:
        """Tell those that asked what their prompts' tokens score, before any token that is sampled after them."""
        at = 0
        for conversation, work in scheduled:
            rows = computed.hidden[at : at + work.rows.count]
            at += work.rows.count
            if conversation.scores and conversation.deliver is not None:
                for scores in scores_of(self._executor, conversation, work, rows):
                    conversation.deliver(scores)

    def _sample(self, scheduled: list[tuple[Conversation, Work]], computed: Computed) -> list[Sampled | None]:
        if computed.logits is None:
            return []
        requests = [
            SampleRequest(settings=c.settings, position=work.rows.end, history=c.history)
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
        if conversation.takes_hidden:
            assert conversation.hidden is not None, "rows were computed that nobody sent"
            conversation.hidden = conversation.hidden[count:]
        elif conversation.shares_prefixes:
            self.pool.publish(conversation.table, conversation.tokens, conversation.position)
        deliver = conversation.deliver
        assert deliver is not None, "an idle session was scheduled"
        if sampled is not None:
            deliver(self._token(conversation, sampled))
            return
        complete = conversation.pending == 0 and not conversation.more
        reply: Reply | None = None
        if conversation.gives_hidden:
            tokens = tuple(conversation.tokens[work.rows.start : work.rows.end])
            reply = Hidden(conversation.session, conversation.generation, work.rows.start, hidden, tokens, last=complete)
        elif complete:
            reply = Cached(conversation.session, conversation.generation, conversation.position)
        if complete and conversation.settings is None:
            self._rest(conversation)
        elif conversation.pending == 0:
            self._wait(conversation)
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
        elif finish is None:
            self._wait(conversation)
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
        """Nothing could be scheduled, and nothing will give pages back: a session under way is too large for the pool."""
        stuck = [c for c in self._conversations.values() if c.pending]
        if stuck and not any(c.waiting for c in self._conversations.values()):
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
                self._linger()
                if not self.run_once() and not self._inbox:
                    self._awake.wait(_LOOK_AGAIN)
        except BaseException as error:
            # A fault of the engine itself: nobody may wait for ever on a loop that is gone.
            reason = error
            raise
        finally:
            for message, deliver in self._inbox:
                if deliver is not None:
                    deliver(Failed(message.session, getattr(message, "generation", 0), ServerFault(str(reason))))
            self._fail([c for c in self._conversations.values() if not c.idle], reason)
            self._end_calls()
            self.after_turn()

    def _linger(self) -> None:
        """Tokens of several sessions come round the ring a moment apart. A forward of a few rows takes about as long as one of a
        single row: so the first of them waits for the others, for a small part of what the forward takes."""
        until = time.perf_counter() + min(_LINGER * self.forward_seconds, _LINGER_AT_MOST)
        while self._inbox and (left := until - time.perf_counter()) > 0:
            expected = sum(c.waiting for c in self._conversations.values())
            if len(self._inbox) >= expected or any(c.pending for c in self._conversations.values()):
                return
            self._awake.wait(left)
            self._awake.clear()

    def check_integrity(self) -> None:
        """Raises `AssertionError` where the sessions and the pages disagree; call it between steps."""
        self.pool.check_integrity()
        for conversation in self._conversations.values():
            known = len(conversation.tokens)
            assert conversation.takes_hidden or conversation.position <= known, f"{conversation.session} caches more than its history"
            assert not (conversation.idle and conversation.pending), f"{conversation.session} is idle with rows to compute"
