"""Work that an engine's thread does beside its sessions, a piece at a time: forward and backward calls."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

from corolla.engine.counters import Counters


class Beside:
    """Jobs in the order of their arrival; added on any thread, advanced on the engine's."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._jobs: deque[tuple[Iterator[None], Callable[[], None]]] = deque()
        self._owed = 0.0  # seconds of sessions' steps until the next piece

    def add(self, job: Iterator[None], on_stop: Callable[[], None]) -> None:
        """A job that must not raise, and what to call if the engine ends before it does."""
        self._jobs.append((job, on_stop))

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
        began, ended = time.perf_counter(), object()
        if next(self._jobs[0][0], ended) is ended:
            self._jobs.popleft()
        self._counters.call_pieces += 1
        self._owed = time.perf_counter() - began
        return True

    def end(self) -> None:
        """Tell all that still wait."""
        with suppress(IndexError):  # of a deque that another thread has just emptied
            while True:
                self._jobs.popleft()[1]()
