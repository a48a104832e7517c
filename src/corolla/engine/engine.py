"""A server's engine: one loop of receive, schedule, forward, reply.

Continuous batching after Orca (Yu et al., 2022), paged KV cache after vLLM (Kwon et al., 2023).
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from corolla.barrier import barrier
from corolla.engine.adapters import AdapterLimits, AdapterStore
from corolla.engine.attention import SequenceRows
from corolla.engine.background_jobs import BackgroundJobs, OnFailure
from corolla.engine.batch import ScheduledSequence
from corolla.engine.budgets import Budgets, Ledger
from corolla.engine.clock import AwakeClock
from corolla.engine.counters import EngineCounters
from corolla.engine.inbox import TOKEN_BYTES, Inbox
from corolla.engine.kv_cache import KVCache
from corolla.engine.model_runner import INVARIANT_ROWS, ModelRunner, prepare_inputs
from corolla.engine.outputs import OutputProcessor, tell
from corolla.engine.parts import EngineParts
from corolla.engine.prompts import PromptLimits, PromptStore
from corolla.engine.sampler import Sampled, SampleRequest
from corolla.engine.scheduler import Scheduler
from corolla.engine.scores import scores_of
from corolla.engine.sequence import Deliver, Sequence
from corolla.engine.sessions import Sessions
from corolla.engine.speculation import verified
from corolla.engine.validation import validated_span
from corolla.errors import AdapterNeeded, Busy, CapacityError, CorollaError, PromptNeeded, ServerFault
from corolla.messages import Gap, Message, Scores
from corolla.models.span import SpanModel
from corolla.types import AdapterPart, Failed, GenerationSettings, Give, PromptPart, Span, Step

_LIGHT_ROWS = 32
_LINGER = 0.1  # of the last forward's time, until sessions that are expected back are waited for no longer
_LINGER_AT_MOST = 1e-3  # seconds
_LOOK_AGAIN = 5.0  # seconds: sessions may wait for the pages of one whose next token never comes
_SWEEP_EVERY = 60.0  # seconds
# What a client may have waiting to be computed, in bytes; where that is more, as many rows as come at once, which may come in parts.
_STEPS_PER_CLIENT, _STEP_ROWS = 32 * 2**20, 8192
_TRIES = 3  # turns with an error outside of any session, one after another, or computations of the engine's own: then it ends


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    cache_tokens: int = 32768  # positions in the pool; memory is taken as they are first used
    page_size: int = 32
    step_rows: int = 256  # rows of one forward: larger prefills faster, smaller lets others decode in between
    max_active: int = 256  # sessions with a step under way; one more is Busy, unless its client has less than an equal share of them
    retry_after: float = 1.0  # seconds, told to who is turned away
    take_adapters: bool = True  # that clients send
    drafts: int = 3  # tokens that are guessed at most, to be computed in one step with the token before them; 0 guesses none
    batch_invariant: bool = False  # the same bits whatever shares the batch, at the cost that docs/performance.md shows
    share_prefixes: bool = False  # computed pages between clients: quicker, and how quick an answer comes tells what others asked
    client_memory: int = 4 * 2**30  # bytes of all that clients may make an engine hold beside the cache; see `budgets`
    stall_after: float = 120.0  # seconds of one turn: a forward of `step_rows` rows takes no longer


@dataclass(slots=True, eq=False)
class Outcome:
    """What a forward left of one session's rows, before anybody is told."""

    sequence: Sequence
    work: ScheduledSequence
    hidden: torch.Tensor  # [rows, hidden]
    scores: list[Scores]
    unscored: torch.Tensor | None
    sampled: list[Sampled]
    error: CorollaError | None = None  # its rows are damaged


class Engine:
    """Serves sessions on one span. `after_turn` is called when the replies of a turn have been delivered.

    `receive` and the callbacks are the whole interface: replies are delivered on the engine's thread, so a callback must
    return quickly and must not call `run_once`. Without `start`, call `run_once` yourself (tests do).

    An error that nobody expected ends the session that caused it, or the job, and no other. The engine is dead (`failure`) where
    that is no remedy: when its pages contradict one another, when no row can be computed at all, or when turns go wrong again and again.
    """

    def __init__(self, model: SpanModel, config: EngineConfig | None = None, parts: EngineParts | None = None) -> None:
        self.model = model
        self.config = config = config or EngineConfig()
        self._parts = parts = parts or EngineParts()
        pages = math.ceil(config.cache_tokens / config.page_size)
        self.pool = parts.pool(pages, config.page_size)
        self.cache = KVCache(model.arch, model.span, pages * config.page_size, config.page_size, model.dtype, model.device)
        self.budgets = budgets = Budgets(config.client_memory)
        self.prompts = PromptStore(model, PromptLimits(size=budgets.prompts, size_per_client=budgets.prompts // 2), convert=parts.convert)
        self.adapters = AdapterStore(
            model,
            AdapterLimits(size=budgets.adapters, size_per_client=budgets.adapters // 2),
            takes=config.take_adapters,
            convert=parts.convert,
        )
        self._runner = ModelRunner(model, self.cache, batch_invariant=config.batch_invariant, attend=parts.attend)
        rows = INVARIANT_ROWS if config.batch_invariant else config.step_rows
        self._clock = AwakeClock()
        self._scheduler = Scheduler(self.pool, rows, self._clock)
        self.counters = EngineCounters()
        one_step = min(self.context_length, _STEP_ROWS) * (4 * model.arch.hidden + TOKEN_BYTES)
        self._ledger = Ledger(budgets.steps, max(_STEPS_PER_CLIENT, one_step), config.retry_after)
        self._sessions = Sessions(
            model, self.pool, self.cache, self.counters, self._clock, self._ledger, share_prefixes=config.share_prefixes
        )
        self._outputs = OutputProcessor(self._sessions, self.pool, self.counters, self.context_length, parts.guess)
        self._background = BackgroundJobs(self.counters)
        self.after_turn: Callable[[], None] = lambda: None
        self.threads: int | None = None  # of the products, taken up between two steps; None: torch's
        self.forward_seconds = 0.0  # of the forward whose replies are being delivered
        self.failure: str | None = None  # why the engine is dead
        self._inbox = Inbox(self._ledger)
        self._computing: Counter[str] = Counter()  # sessions that had rows to compute when the last turn began, by client
        self._swept = self._clock.now()  # when unused sessions were looked for
        self._awake = threading.Event()
        self._turned = self._clock.now()  # when the last turn began
        self._faulty_turns = 0  # that have followed one another
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
            "bytes_waiting": self._ledger.total,
        }

    @property
    def alive(self) -> bool:
        """Whether somebody computes what is received: false when the engine is dead or its thread has ended."""
        return self.failure is None and (self._thread is None or self._thread.is_alive())

    @property
    def stalled(self) -> bool:
        """Whether there is work, and its thread has not turned for `EngineConfig.stall_after` seconds, of which those are not counted in
        which the process slept. It has to be asked again and again."""
        late = self._clock.now() - self._turned > self.config.stall_after  # asked for first: the clock has to be looked at
        return late and self._thread is not None and self._has_work

    @property
    def _has_work(self) -> bool:
        return len(self._inbox) > 0 or len(self._background) > 0 or any(c.pending for c in self._sessions)

    @property
    def healthy(self) -> bool:
        """Whether it answers what it receives."""
        return self.alive and not self.stalled

    @property
    def free_tokens(self) -> int:
        """Positions that a newcomer could have: in free pages and in those of idle sessions, and at least an equal share of all pages
        beside the clients that have sessions under way, however many of the pages these hold."""
        sessions = list(self._sessions)
        idle = sum(len(c.table.pages) for c in sessions if c.idle)
        share = self.pool.num_pages // (1 + len({c.client for c in sessions if not c.idle}))
        return min(max(self.pool.free_pages + idle, share), self.pool.num_pages) * self.pool.page_size

    def whereabouts(self, session: str, generation: int) -> tuple[int, int]:
        """Tokens of a session's generation that are cached here, and rows that are still to be computed."""
        waiting = self._inbox.rows_of(session)
        known = self._sessions.get(session)
        if known is None or known.generation != generation:
            return 0, waiting
        return known.position + known.rejected, known.pending + waiting

    # Receive.

    def receive(self, message: Message, deliver: Deliver | None = None) -> None:
        """Take a message, from any thread; what comes of a `Step` goes to `deliver`. A `Cancel` or a `Close` changes nothing
        once the engine has ended.

        Raises:
            Busy: too many sessions have a step under way, or too many bytes of this client's, or of all, wait to be computed.
            EmptyPrompt, PromptTooLong, InvalidSetting: the step can never be computed.
            PromptNeeded, AdapterNeeded: the step's soft prompt or adapter has to be given first.
            NetworkError: its adapter is not here, and none are taken.
            ServerFault: the engine is dead, or was stopped.
        """
        if isinstance(message, Step):
            span = validated_span(message, self.model, self.context_length)
            self.prompts.check(message, span)
            self.adapters.check(message, span)
            known = self._sessions.get(message.session)
            if (known is None or known.idle) and self._full_for(message.client):
                raise Busy(self.config.retry_after)
        elif isinstance(message, Give):
            self._keep(message.part)
            return
        self._inbox.put(message, deliver)
        self._awake.set()

    def _full_for(self, client: str) -> bool:
        """Whether a client may have no further session under way: all places are taken, and it has its equal share of them."""
        computing, inbox, places = self._computing, self._inbox, self.config.max_active
        if computing.total() + inbox.sessions < places:
            return False
        clients = computing.keys() | inbox.clients | {client}
        return computing[client] + inbox.sessions_of(client) >= places // len(clients)

    def _keep(self, part: PromptPart | AdapterPart) -> None:
        """What somebody in this process gives: an adapter for good, as its memory is theirs, too."""
        if isinstance(part, AdapterPart):
            self.adapters.hold(part)
        else:
            self.prompts.put("", part)

    def call(self, job: Iterator[None], on_failure: OnFailure = lambda error: None, client: str = "") -> None:
        """Work for the engine's thread beside the sessions, from any thread: one `next` after each step, so that nobody's
        tokens wait for all of it; jobs of several clients take turns. `on_failure` is told if the job raises, or if the engine ends
        before the job does.

        Raises `ServerFault` where the engine is dead, or was stopped."""
        self._background.add(job, on_failure, client)
        self._awake.set()

    # The loop.

    def run_once(self) -> bool:
        """One turn: receive, schedule, forward, reply, and a piece of the calls. False when there was nothing to compute, and when the
        engine is dead."""
        if self.failure is not None:
            return False
        self._turned = self._clock.now()
        busy, errors = True, list[Exception]()
        with barrier("an engine's turn", errors.append):
            busy = self._turn()
        with barrier("sending an engine's replies", errors.append):
            self.after_turn()
        self._faulty_turns = self._faulty_turns + 1 if errors else 0
        if errors:
            self.counters.unexpected += len(errors)
            self._consider_ending(errors[0])
        return busy

    def _turn(self) -> bool:
        while (received := self._inbox.take()) is not None:
            self._take(*received)
        if self._turned - self._swept > _SWEEP_EVERY:
            self._swept = self._turned
            self._sessions.forget_unused()
        scheduled = self._prepare_inputs(self._schedule())
        if scheduled:
            self.counters.steps += 1
        began = time.perf_counter()
        for span in sorted({sequence.span for sequence, _ in scheduled}):
            self._step(span, [(sequence, work) for sequence, work in scheduled if sequence.span == span])
        called = self._background.advance(time.perf_counter() - began if scheduled else None)
        return bool(scheduled) or called or self._fail_stuck()

    def _take(self, message: Message, deliver: Deliver | None) -> None:
        errors: list[Exception] = []
        with barrier("receiving a message", errors.append):
            self._sessions.take(message, deliver)
        if errors:
            if deliver is not None:
                fault = ServerFault(f"the step was not taken in: {errors[0]!r}")
                tell(deliver, Failed(message.session, getattr(message, "generation", 0), fault))
            known = self._sessions.get(message.session)
            if known is not None:
                known.deliver = None  # of the step that has just been answered, or of one in whose place it came
            self._fail(known, errors[0])

    def _fail(self, sequence: Sequence | None, error: Exception) -> None:
        """End the session that an unexpected error came from. Raises `AssertionError` where others are touched by it."""
        self.counters.unexpected += 1
        if sequence is not None:
            self._outputs.fail([sequence], error)
        self.check_integrity()

    def _schedule(self) -> list[tuple[Sequence, ScheduledSequence]]:
        schedule = self._scheduler.schedule(self._sessions)
        self._computing = schedule.running
        self.counters.reused += schedule.reused
        self.counters.evicted_idle += len(schedule.evicted)
        self.counters.evicted_running += len(schedule.preempted)
        for sequence in schedule.evicted:
            self._sessions.forget(sequence)
        for sequence in schedule.preempted:
            # A whole model computes the tokens again by itself; the servers of a route are all given them again.
            if len(sequence.span) < self.model.arch.blocks or sequence.takes_hidden:
                self._sessions.forget(sequence)
                assert sequence.deliver is not None, "an idle session was set back"
                tell(sequence.deliver, Gap(sequence.session, sequence.generation, 0))
        for sequence, error in schedule.failed:
            self._fail(sequence, error)
        return schedule.work

    def _prepare_inputs(self, scheduled: list[tuple[Sequence, ScheduledSequence]]) -> list[tuple[Sequence, ScheduledSequence]]:
        """With their adapters and what their soft prompts put in; those of whom something was forgotten meanwhile are told. The rows of
        one adapter lie together."""
        ready = []
        for sequence, work in scheduled:
            errors: list[Exception] = []
            with barrier("a prompt or an adapter", errors.append):
                try:
                    ready.append((sequence, prepare_inputs(work, sequence, self.prompts, self.adapters)))
                except (PromptNeeded, AdapterNeeded) as needed:
                    self._outputs.fail([sequence], needed)
            if errors:
                self._fail(sequence, errors[0])
        return sorted(ready, key=lambda both: both[0].adapter)

    def _step(self, span: Span, scheduled: list[tuple[Sequence, ScheduledSequence]]) -> None:
        """Forward and reply for the sessions that go through the same blocks."""
        began = time.perf_counter()
        outcomes = self._computed(span, scheduled)
        if self.model.device.type == "cuda":  # what was asked of it is computed later
            torch.cuda.synchronize(self.model.device)
        self.forward_seconds = time.perf_counter() - began
        if sum(work.rows.count for _, work in scheduled) <= _LIGHT_ROWS:
            self.counters.light_steps += 1
            self.counters.light_seconds += self.forward_seconds / len(span)
        # Of several sessions together the rows of guesses take longer than they save: 0.9 times as many tokens a second with 4, where
        # one alone has 1.3 times as many. Sessions whose tokens are long on their way between machines come one at a time.
        drafts = self.config.drafts if len(scheduled) == 1 and self._runner.drafts_are_cheap else 0
        for outcome in outcomes:
            errors: list[Exception] = []
            with barrier("replying to a session", errors.append):
                self._reply(outcome, drafts)
            if errors:
                self._fail(outcome.sequence, errors[0])

    def _computed(self, span: Span, scheduled: list[tuple[Sequence, ScheduledSequence]]) -> list[Outcome]:
        """What the sessions' rows give. After an error each half of them is computed again, until the session that causes it is alone:
        nobody has been told anything yet, and what is written to the cache is written once more."""
        errors: list[Exception] = []
        with barrier("computing a batch", errors.append):
            return self._compute(span, scheduled)
        if len(scheduled) > 1:
            half = len(scheduled) // 2
            return self._computed(span, scheduled[:half]) + self._computed(span, scheduled[half:])
        self._fail(scheduled[0][0], errors[0])
        self._check_computing(span)
        return []

    def _compute(self, span: Span, scheduled: list[tuple[Sequence, ScheduledSequence]]) -> list[Outcome]:
        computed = self._runner.forward([work for _, work in scheduled], span)
        sampled = iter(verified(scheduled, computed.logits, self._parts.sample))
        outcomes, at = [], 0
        for sequence, work in scheduled:
            hidden = computed.hidden[at : at + work.rows.count]
            at += work.rows.count
            tokens = next(sampled) if work.logits else []
            outcome = Outcome(sequence, work, hidden, [], sequence.unscored, tokens or [])
            if tokens is None:
                outcome.error = ServerFault("the logits hold NaN or infinity: the weights or the hidden states behind them are damaged")
            elif sequence.scores:
                try:
                    outcome.scores, outcome.unscored = scores_of(self._runner, sequence, work, hidden)
                except ServerFault as error:
                    outcome.error = error
            outcomes.append(outcome)
        return outcomes

    def _reply(self, outcome: Outcome, drafts: int) -> None:
        """The scores of a prompt's tokens come before any token that is sampled after them."""
        sequence = outcome.sequence
        if outcome.error is not None:
            self._outputs.fail([sequence], outcome.error)
            return
        sequence.unscored = outcome.unscored
        for scores in outcome.scores:
            assert sequence.deliver is not None, "an idle session was scheduled"
            sequence.deliver(scores)
        self._outputs.reply(sequence, outcome.work, outcome.hidden, outcome.sampled, drafts)

    def _check_computing(self, span: Span) -> None:
        """A row that is nobody's tells a fault of the engine from one of a session. Raises what computing it raises: the engine ends."""
        errors: list[Exception] = []
        for _ in range(_TRIES):
            with barrier("computing a row of the engine's own", errors.append):
                self._compute_own_row(span)
                return
        self.failure = repr(errors[-1])
        raise errors[-1]

    def _compute_own_row(self, span: Span) -> None:
        model, table = self.model, self.pool.open()
        if not self.pool.reserve(table, 1):
            return  # others compute in these pages
        try:
            zeros = [0] if span.start == 0 else torch.zeros(1, model.arch.hidden, dtype=model.dtype, device=model.device)
            logits = self._runner.forward([ScheduledSequence(SequenceRows(table, 0, 1), zeros, logits=1)], span).logits
            if logits is not None:
                self._parts.sample(logits, [SampleRequest(GenerationSettings(), 1, [0])])
        finally:
            self.pool.free(table)

    def _fail_stuck(self) -> bool:
        """Nothing could be scheduled, and nothing will give pages back: a session under way is too large for the pool."""
        stuck = [c for c in self._sessions if c.pending]
        if stuck and not any(c.waiting for c in self._sessions):
            self._outputs.fail(stuck, CapacityError("the KV cache has no room for this session", self.config.retry_after))
        return False

    # Its life.

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="corolla-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the step under way; sessions with one under way are told."""
        self._stopping = True
        self._awake.set()
        if self._thread is not None:
            self._thread.join()
        self._end(ServerFault("the engine was stopped"))

    def _run(self) -> None:
        try:
            while not self._stopping and self.failure is None:
                with barrier("the engine's thread", self._consider_ending):
                    self._loop()
        finally:
            if not self._stopping and self.failure is None:
                self.failure = "its thread was ended"
            self._end(ServerFault(f"the engine ended: {self.failure or 'it was stopped'}"))

    def _loop(self) -> None:
        while not self._stopping and self.failure is None:
            if self.threads is not None and self.threads != torch.get_num_threads():
                torch.set_num_threads(self.threads)
            self._awake.clear()
            self._linger()
            if not self.run_once() and not self._inbox:
                self._turned = self._clock.now()
                self._awake.wait(_LOOK_AGAIN)

    def _consider_ending(self, error: Exception) -> None:
        """After an error outside of any session."""
        errors: list[Exception] = []
        with barrier("an engine's pages and sessions", errors.append):
            self.check_integrity()
        if errors or self._faulty_turns >= _TRIES:
            self.failure = repr(errors[0] if errors else error)
        if self.failure is not None:
            self._end(ServerFault(f"the engine ended: {self.failure}"))

    def _end(self, error: ServerFault) -> None:
        """Tell all that wait. Nothing is taken from here on."""
        for message, deliver in self._inbox.close(error):
            if deliver is not None:
                tell(deliver, Failed(message.session, getattr(message, "generation", 0), error))
        for sequence in self._sessions:
            if not sequence.idle:
                with barrier("a session of an engine that ends"):
                    self._outputs.fail([sequence], error)
        self._background.end(error)
        with barrier("sending an engine's last replies"):
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
