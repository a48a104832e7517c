"""A server's engine: one loop of receive, schedule, forward, reply.

Continuous batching after Orca (Yu et al., 2022), paged KV cache after vLLM (Kwon et al., 2023).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from corolla.engine.adapters import AdapterStore
from corolla.engine.admission import admitted_span
from corolla.engine.beside import Beside
from corolla.engine.cache import KVCache
from corolla.engine.counters import Counters
from corolla.engine.drafts import Guess, guess, verified
from corolla.engine.executor import INVARIANT_ROWS, Executor
from corolla.engine.furnishing import furnished
from corolla.engine.pages import PagePool
from corolla.engine.prompts import PromptStore
from corolla.engine.replying import Replying
from corolla.engine.scheduler import Scheduler
from corolla.engine.scores import scores_of
from corolla.engine.sequence import Conversation, Deliver
from corolla.engine.sessions import Sessions
from corolla.engine.work import Computed, Work
from corolla.errors import AdapterNeeded, Busy, CapacityError, CorollaError, PromptNeeded, ServerFault
from corolla.models.span import SpanModel
from corolla.types import AdapterPart, Failed, Gap, Give, Message, PromptPart, Span, Step

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
    drafts: int = 3  # tokens that are guessed at most, to be computed in one step with the token before them; 0 guesses none
    batch_invariant: bool = False  # the same bits whatever shares the batch, at the cost that docs/performance.md shows


class Engine:
    """Serves sessions on one span. `after_turn` is called when the replies of a turn have been delivered. `guess` says which tokens
    may follow (`engine.drafts`): a better one makes answers quicker and changes nothing in them.

    `receive` and the callbacks are the whole interface: replies are delivered on the engine's thread, so a callback must
    return quickly and must not call `run_once`. Without `start`, call `run_once` yourself (tests do).
    """

    def __init__(self, model: SpanModel, config: EngineConfig | None = None, guess: Guess = guess) -> None:
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
        self.counters = Counters()
        self._sessions = Sessions(model, self.pool, self.cache, self.counters)
        self._replying = Replying(self._sessions, self.pool, self.counters, self.context_length, guess)
        self._beside = Beside(self.counters)
        self.after_turn: Callable[[], None] = lambda: None
        self.threads: int | None = None  # of the products, taken up between two steps; None: torch's
        self.forward_seconds = 0.0  # of the forward whose replies are being delivered
        self._inbox: deque[tuple[Message, Deliver | None]] = deque()
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
        return sum(not c.idle for c in self._sessions) + len(self._inbox)

    @property
    def gauges(self) -> dict[str, int]:
        """What is held now, by name. A page counts for each session that holds it: no sum tells what sessions share."""
        sessions = list(self._sessions)
        return {
            "sessions_cached": len(sessions),
            "pages_held": sum(len(session.table.pages) for session in sessions),
            "messages_waiting": len(self._inbox),
        }

    @property
    def _computing(self) -> int:
        """The same without those that wait for their next token."""
        return sum(c.pending > 0 for c in self._sessions) + len(self._inbox)

    @property
    def alive(self) -> bool:
        """Whether somebody computes what is received: false when the thread has ended."""
        return self._thread is None or self._thread.is_alive()

    @property
    def free_tokens(self) -> int:
        """Positions that a newcomer could have: in free pages, and in those of idle sessions."""
        idle = sum(len(c.table.pages) for c in self._sessions if c.idle)
        return min(self.pool.free_pages + idle, self.pool.num_pages) * self.pool.page_size

    def whereabouts(self, session: str, generation: int) -> tuple[int, int]:
        """Tokens of a session's generation that are cached here, and rows that are still to be computed."""
        waiting = sum(len(message.payload) for message, _ in list(self._inbox) if isinstance(message, Step) and message.session == session)
        known = self._sessions.get(session)
        if known is None or known.generation != generation:
            return 0, waiting
        return known.position + known.refuted, known.pending + waiting

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
            span = admitted_span(message, self.model, self.context_length)
            self.prompts.check(message, span)
            self.adapters.check(message, span)
            known = self._sessions.get(message.session)
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
        self._beside.add(job, on_stop)
        if self._stopping and not self.alive:
            self._beside.end()
        self._awake.set()

    # The loop.

    def run_once(self) -> bool:
        """One turn: receive, schedule, forward, reply, and a piece of the calls. False when there was nothing to compute."""
        while self._inbox:
            self._sessions.take(*self._inbox.popleft())
        scheduled = self._furnished(self._schedule())
        if scheduled:
            self.counters.steps += 1
        began = time.perf_counter()
        for span in sorted({conversation.span for conversation, _ in scheduled}):
            self._forward(span, [(conversation, work) for conversation, work in scheduled if conversation.span == span])
        called = self._beside.advance(time.perf_counter() - began if scheduled else None)
        busy = bool(scheduled) or called or self._fail_stuck()
        self.after_turn()
        return busy

    def _forward(self, span: Span, scheduled: list[tuple[Conversation, Work]]) -> None:
        """Forward and reply for the sessions that go through the same blocks."""
        began = time.perf_counter()
        try:
            computed = self._executor.forward([work for _, work in scheduled], span)
            self._score(scheduled, computed)
            sampled = iter(verified(scheduled, computed.logits))
        except (CorollaError, RuntimeError, MemoryError) as error:
            self._replying.fail([c for c, _ in scheduled], error)
            return
        self.forward_seconds = time.perf_counter() - began
        if sum(work.rows.count for _, work in scheduled) <= _LIGHT_ROWS:
            self.counters.light_steps += 1
            self.counters.light_seconds += self.forward_seconds / len(span)
        # Of several sessions together the rows of guesses take longer than they save: 0.9 times as many tokens a second with 4, where
        # one alone has 1.3 times as many. Sessions whose tokens are long on their way between machines come one at a time.
        drafts = self.config.drafts if len(scheduled) == 1 and self._executor.drafts_are_cheap else 0
        at = 0
        for conversation, work in scheduled:
            hidden = computed.hidden[at : at + work.rows.count]
            at += work.rows.count
            tokens = next(sampled) if work.logits else []
            if tokens is None:
                damaged = ServerFault("the logits hold NaN or infinity: the weights or the hidden states behind them are damaged")
                self._replying.fail([conversation], damaged)
            else:
                self._replying.reply(conversation, work, hidden, tokens, drafts)

    def _schedule(self) -> list[tuple[Conversation, Work]]:
        schedule = self._scheduler.schedule(self._sessions)
        self.counters.reused += schedule.reused
        self.counters.evicted_idle += len(schedule.evicted)
        self.counters.evicted_running += len(schedule.set_back)
        for conversation in schedule.evicted:
            self._sessions.forget(conversation)
        for conversation in schedule.set_back:
            deliver = conversation.deliver
            # A whole model computes the tokens again by itself; the servers of a route are all given them again.
            if len(conversation.span) < self.model.arch.blocks or conversation.takes_hidden:
                self._sessions.forget(conversation)
                assert deliver is not None, "an idle session was set back"
                deliver(Gap(conversation.session, conversation.generation, 0))
        return schedule.work

    def _furnished(self, scheduled: list[tuple[Conversation, Work]]) -> list[tuple[Conversation, Work]]:
        """With their adapters and what their soft prompts put in; those of whom something was forgotten meanwhile are told. The rows of
        one adapter lie together."""
        ready = []
        for conversation, work in scheduled:
            try:
                ready.append((conversation, furnished(work, conversation, self.prompts, self.adapters)))
            except (PromptNeeded, AdapterNeeded) as needed:
                self._replying.fail([conversation], needed)
        return sorted(ready, key=lambda both: both[0].adapter)

    def _score(self, scheduled: list[tuple[Conversation, Work]], computed: Computed) -> None:
        """Tell those that asked what their prompts' tokens score, before any token that is sampled after them."""
        at = 0
        for conversation, work in scheduled:
            rows = computed.hidden[at : at + work.rows.count]
            at += work.rows.count
            if conversation.scores and conversation.deliver is not None:
                for scores in scores_of(self._executor, conversation, work, rows):
                    conversation.deliver(scores)

    def _fail_stuck(self) -> bool:
        """Nothing could be scheduled, and nothing will give pages back: a session under way is too large for the pool."""
        stuck = [c for c in self._sessions if c.pending]
        if stuck and not any(c.waiting for c in self._sessions):
            self._replying.fail(stuck, CapacityError("the KV cache has no room for this session", self.config.retry_after))
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
                if self.threads is not None and self.threads != torch.get_num_threads():
                    torch.set_num_threads(self.threads)
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
            self._replying.fail([c for c in self._sessions if not c.idle], reason)
            self._beside.end()
            self.after_turn()

    def _linger(self) -> None:
        """Tokens of several sessions come round the ring a moment apart. A forward of a few rows takes about as long as one of a
        single row: so the first of them waits for the others, for a small part of what the forward takes."""
        until = time.perf_counter() + min(_LINGER * self.forward_seconds, _LINGER_AT_MOST)
        while self._inbox and (left := until - time.perf_counter()) > 0:
            expected = sum(c.waiting for c in self._sessions)
            if len(self._inbox) >= expected or any(c.pending for c in self._sessions):
                return
            self._awake.wait(left)
            self._awake.clear()

    def check_integrity(self) -> None:
        """Raises `AssertionError` where the sessions and the pages disagree; call it between steps."""
        self.pool.check_integrity()
        self._sessions.check_integrity()
