"""Who may begin an answer now: a bounded number at a time, fair shares between callers, bounded queues, and rates."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from corolla.errors import Busy, RateLimited


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    streams: int = 64  # answers under way at a time
    waiting: int = 128  # requests that wait for a place
    waiting_of_one: int = 96  # of these, at most so many of one caller
    retry_after: float = 2.0  # seconds, told to who is turned away


class FairQueue:
    """Places for answers. When one is free, the caller with the fewest gets it; callers with equally many take turns.

    For one event loop.
    """

    def __init__(self, config: QueueConfig | None = None) -> None:
        self.config = config or QueueConfig()
        self._active: dict[str, int] = {}
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # whose turn is next comes first

    @property
    def active(self) -> int:
        """Places taken."""
        return sum(self._active.values())

    @property
    def waiting(self) -> int:
        """Requests in the queues."""
        return sum(map(len, self._queues.values()))

    def check(self, caller: str) -> None:
        """Raises `Busy` where `place` would: for who wants to know before anything is promised."""
        if self.active < self.config.streams:
            return
        if self.waiting >= self.config.waiting or len(self._queues.get(caller, ())) >= self.config.waiting_of_one:
            raise Busy(self.config.retry_after)

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[float]:
        """A place, waited for if need be; gives the seconds waited. Raises `Busy` when the queue is full."""
        began = time.perf_counter()
        await self.take(caller)
        try:
            yield time.perf_counter() - began
        finally:
            self.leave(caller)

    async def take(self, caller: str) -> None:
        """See `place`; to be followed by `leave`."""
        self.check(caller)
        if self.active < self.config.streams:
            self._active[caller] = self._active.get(caller, 0) + 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(caller)  # the place came just as its caller went away
            elif (queue := self._queues.get(caller)) and turn in queue:
                queue.remove(turn)
            raise

    def leave(self, caller: str) -> None:
        """Give a place back."""
        self._active[caller] -= 1
        if not self._active[caller]:
            del self._active[caller]
        self._next()

    def _next(self) -> None:
        for caller in [caller for caller, queue in self._queues.items() if not queue]:
            del self._queues[caller]
        if not self._queues or self.active >= self.config.streams:
            return
        caller = min(self._queues, key=lambda caller: self._active.get(caller, 0))
        turn = self._queues[caller].popleft()
        self._queues.move_to_end(caller)
        self._active[caller] = self._active.get(caller, 0) + 1
        turn.set_result(None)


class Rates:
    """Requests a minute of each caller: a bucket that fills steadily and holds a minute's worth. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # what was left, and when

    def check(self, caller: str, per_minute: float | None) -> None:
        """Count one request. Raises `RateLimited`; without a rate nothing is counted."""
        if per_minute is None:
            return
        now = self._clock()
        left, then = self._buckets.get(caller, (per_minute, now))
        left = min(per_minute, left + (now - then) * per_minute / 60)
        if left < 1:
            raise RateLimited(per_minute, math.ceil((1 - left) * 60 / per_minute * 10) / 10)
        self._buckets[caller] = left - 1, now
