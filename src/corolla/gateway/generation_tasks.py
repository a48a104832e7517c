"""Answers that are written on threads and read from the event loop.

A session waits for its tokens on a thread, as all clients of Corolla do; here each answer under way has one. Pieces cross to the
event loop through a deque, and one wake-up tells of all that has come, for whichever answers, since the last one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.barrier import barrier
from corolla.client.completion import Completion, CompletionDelta, CompletionResult
from corolla.errors import CorollaError, Interrupted
from corolla.gateway.fair_queue import FairQueue
from corolla.gateway.metrics import Metrics
from corolla.gateway.model_registry import ServedModel
from corolla.gateway.pool import PooledSession, SessionPool
from corolla.messages import Score
from corolla.types import GenerationSettings

if TYPE_CHECKING:
    from corolla.models.prompts import SoftPrompt


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person who waits for the answer should know."""

    text: str


LOST = Notice("A server was lost; the answer goes on with others.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One answer to be written: the whole prompt as tokens, and how. `owner` is whose request it is; nobody else gets its session."""

    model: ServedModel
    owner: str
    prompt: Sequence[int]
    settings: GenerationSettings
    keep: bool = False  # the session of an answer that was stopped; those of others stay for a while in any case
    soft: SoftPrompt | None = None
    session: PooledSession | None = None  # to be used; its owner takes care of it, and asks for one answer at a time


class Bell:
    """Wakes an event loop from threads: rung for several answers before it is heard, it is heard once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung: deque[asyncio.Event] = deque()
        self._heard = True

    def ring(self, event: asyncio.Event) -> None:
        """Have `event` set in the loop; from any thread."""
        self._rung.append(event)
        if self._heard:
            self._heard = False
            self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        self._heard = True  # before looking: what is rung from now on rings anew
        while self._rung:
            self._rung.popleft().set()


class GenerationTask:
    """One answer under way, for the event loop that made it. `result` stands when `ended` is set.

    It waits for its turn, then it is written; nobody needs to look on.
    """

    def __init__(
        self,
        request: GenerationRequest,
        queue: FairQueue,
        threads: ThreadPoolExecutor,
        pool: SessionPool,
        metrics: Metrics,
        bell: Bell,
        timeout: float,
    ) -> None:
        self.request = request
        self.result: CompletionResult | None = None
        self.error: CorollaError | None = None
        self.scores: dict[int, Score] = {}  # of the prompt's tokens, by position, where they were asked for
        self.queued: float | None = None  # seconds until its turn; None while it waits
        self.ended = asyncio.Event()
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._items: deque[CompletionDelta | Notice | None] = deque()
        self._ready = asyncio.Event()
        self._bell = bell
        self._lock = threading.Lock()
        self._kept: PooledSession | None = None  # while this answer is the one that uses it
        self._stopped = False
        self.began = time.perf_counter()
        self._metrics = metrics
        self.place = queue.waiting + 1  # in the queue, where there was one
        self._task = asyncio.create_task(self._live(queue, threads, pool))
        self._task.add_done_callback(lambda _: self._end(self.error))  # one that was stopped before its turn has not said so

    def stop(self) -> None:
        """End the answer where it is; the iteration ends soon, without an error. What has ended stays as it is."""
        if self._stopped:
            return
        self._stopped = True
        if self.queued is None:
            self._task.cancel()
            return
        with self._lock:
            if self._kept is not None:
                self._kept.transport.interrupt()

    def when_ended(self, act: Callable[[], None]) -> None:
        """Have something done when nothing is left of the answer."""
        self._task.add_done_callback(lambda _: act())

    async def begun(self, seconds: float) -> None:
        """Wait for the first token, but no longer than this. Raises what ended the answer before it.

        What fails at once can so be answered with a status of its own, and a long prefill is not waited for.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), seconds)
        if self.error is not None and not any(isinstance(item, CompletionDelta) for item in self._items):
            raise self.error

    async def items(self, tick: float) -> AsyncIterator[CompletionDelta | Notice | None]:
        """Pieces and notices as they come, `None` whenever nothing has come for `tick` seconds. Raises what ended the answer."""
        while True:
            while self._items:
                item = self._items.popleft()
                if item is None:
                    if self.error is not None:
                        raise self.error
                    return
                yield item
            self._ready.clear()
            timer = self._loop.call_later(tick, self._ready.set)
            try:
                await self._ready.wait()
            finally:
                timer.cancel()
            if not self._items:
                yield None

    async def whole(self) -> CompletionResult:
        """The result, when it stands. Raises what ended the answer."""
        await self.ended.wait()
        if self.error is not None:
            raise self.error
        assert self.result is not None, "an answer that nobody stopped has a result"
        return self.result

    async def _live(self, queue: FairQueue, threads: ThreadPoolExecutor, pool: SessionPool) -> None:
        owner = self.request.owner
        try:
            await queue.take(owner)
        except CorollaError as error:
            self._end(error)
            return
        self.queued = time.perf_counter() - self.began
        try:
            with barrier("an answer", lambda _: self._end(CorollaError("a fault of the gateway; its log says more"))):
                await self._loop.run_in_executor(threads, self._write, pool)
        finally:
            queue.leave(owner)
            self._metrics.answered(self.request.model.name, self.queued, self.result, self.error)
            self.ended.set()

    def _end(self, error: CorollaError | None) -> None:
        if not self.ended.is_set():
            self.error = error
            self._put(None)
            self.ended.set()

    def _write(self, pool: SessionPool) -> None:
        """On a thread: all of the answer."""
        request = self.request
        kept: PooledSession | None = None
        completion: Completion | None = None
        good = False
        try:
            kept = request.session or pool.take(request.model, request.owner, request.prompt, request.soft)
            kept.transport.begin()
            kept.transport.on_restart = self._restarted
            with self._lock:
                self._kept = kept
            if self._stopped:
                raise Interrupted
            completion = Completion(kept.session, request.model.tokenizer, request.prompt, request.settings, timeout=self._timeout)
            for piece in completion:
                self._put(piece)
                self._metrics.rate.count()
            good = True
        except Interrupted:
            good = request.keep
        except CorollaError as error:
            self.error = error
        finally:
            with self._lock:
                self._kept = None  # it is the next answer's: to stop this one must not end that
            if completion is not None:
                completion.close()
                self.result = completion.result
                self.scores = kept.session.scores if kept is not None else {}
            if kept is not None and request.session is None:
                if good:
                    pool.give_back(kept)
                else:
                    kept.close()
            self._put(None)

    def _restarted(self) -> None:
        self._put(LOST)

    def _put(self, item: CompletionDelta | Notice | None) -> None:
        self._items.append(item)
        self._bell.ring(self._ready)


class TaskRunner:
    """The threads that answers are written on, as many as the `queue` has places."""

    def __init__(self, queue: FairQueue, pool: SessionPool, metrics: Metrics, *, timeout: float = 600.0) -> None:
        self.queue, self.pool, self.metrics = queue, pool, metrics
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(queue.config.streams, thread_name_prefix="corolla-answer")
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="corolla-prompt")
        self._bell: Bell | None = None
        self.under_way: set[GenerationTask] = set()

    @property
    def tokens_per_second(self) -> float:
        """Of all answers together, in the last few seconds."""
        return self.metrics.rate.per_second

    def begin(self, request: GenerationRequest) -> GenerationTask:
        """An answer that goes on until its end or `stop`, whether or not anybody iterates. Raises `Busy`."""
        self.queue.check(request.owner)
        self._bell = self._bell or Bell()
        answer = GenerationTask(request, self.queue, self._threads, self.pool, self.metrics, self._bell, self._timeout)
        self.under_way.add(answer)
        answer.when_ended(lambda: self.under_way.discard(answer))
        return answer

    async def prepare(self, make: Callable[[], list[int]]) -> list[int]:
        """A prompt's tokens, made beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, make)

    async def drain(self, deadline: float) -> None:
        """Wait until nothing is under way, or until the deadline (on `time.monotonic`'s clock)."""
        while self.under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def interrupt(self) -> None:
        """End all answers where they are."""
        for answer in list(self.under_way):
            answer.stop()

    async def close(self) -> None:
        """Interrupt what is under way and close all sessions."""
        answers = list(self.under_way)
        self.interrupt()
        await asyncio.gather(*(answer.ended.wait() for answer in answers))
        self._threads.shutdown(wait=True)
        self._preparing.shutdown(wait=True)
        self.pool.close()
