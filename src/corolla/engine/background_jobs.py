"""Work that an engine's thread does beside its sessions, a piece at a time: forward and backward calls."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import chain

from corolla.barrier import barrier
from corolla.engine.counters import EngineCounters
from corolla.errors import CorollaError, ServerFault

OnFailure = Callable[[CorollaError], None]
"""Told why a job will not be done."""


class BackgroundJobs:
    """A job at a time, of each client in turn; added on any thread, advanced on the engine's."""

    def __init__(self, counters: EngineCounters) -> None:
        self._counters = counters
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, deque[tuple[Iterator[None], OnFailure]]] = OrderedDict()  # by client, whose turn it is first
        self._owed = 0.0  # seconds of sessions' steps until the next piece
        self._closed: CorollaError | None = None

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._jobs.values()))

    def add(self, job: Iterator[None], on_failure: OnFailure, client: str) -> None:
        """A job, and whom to tell if it raises, or if the engine ends before it does. Raises what `end` was given."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._jobs.setdefault(client, deque()).append((job, on_failure))

    def advance(self, step_seconds: float | None) -> bool:
        """A piece of the oldest job, unless sessions have steps to compute (this turn's took so long) and the last piece took longer
        than their steps since: beside sessions, jobs get half of the time."""
        if not self._jobs:
            return False
        if step_seconds is not None:
            self._owed -= step_seconds
            if self._owed > 0:
                self._counters.call_pieces_put_off += 1
                return False
        began, ended, errors = time.perf_counter(), object(), list[Exception]()
        with self._lock:
            client, jobs = next(iter(self._jobs.items()))
            job, on_failure = jobs[0]
        going = False
        with barrier("a call", errors.append):
            going = next(job, ended) is not ended
        if not going:
            self._over(client)
        if errors:
            self._counters.unexpected += 1
            with barrier("the answer to a call"):
                on_failure(ServerFault(f"the call failed: {errors[0]!r}"))
        self._counters.call_pieces += 1
        self._owed = time.perf_counter() - began
        return True

    def _over(self, client: str) -> None:
        """The job of this client's turn is over; the next one is another client's."""
        with self._lock:
            self._jobs[client].popleft()
            self._jobs.move_to_end(client)
            if not self._jobs[client]:
                del self._jobs[client]

    def end(self, error: CorollaError) -> None:
        """Take no more jobs, and tell all that still wait."""
        with self._lock:
            self._closed = self._closed or error
            left = list(chain.from_iterable(self._jobs.values()))
            self._jobs.clear()
        for _, on_failure in left:
            with barrier("the answer to a call"):
                on_failure(error)
