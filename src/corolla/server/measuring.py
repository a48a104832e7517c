"""How fast a server computes, measured: at first, from what it serves, and from steps of its own while nobody asks for any.

All in rows a second through one block, for one row at a time: a forward of a few rows takes about as long as one row does.
"""

from __future__ import annotations

import queue
import statistics
import time
import uuid
from collections.abc import Callable, Iterator

import torch

from corolla.engine.engine import Engine
from corolla.errors import CapacityError
from corolla.messages import Close, Reply
from corolla.types import GenerationSettings, Step

_FIRST_STEPS = 12
_ENOUGH = 8  # forwards that say something about the throughput
_IDLE_AFTER = 30.0  # seconds without enough of them
_HALF_LIFE = 5.0  # seconds in which what was measured before loses half of its weight
_NOTICEABLE = 1.2  # times: what changes by less is noise, and servers should not move for it
_PATIENCE = 10.0  # seconds for one step of a server's own
_SESSION = f"measuring-{uuid.uuid4().hex}"  # not to be mistaken for a client's


def measure_throughput(engine: Engine) -> float:
    """The throughput of an engine that is not started, over single steps."""
    replies: list[Reply] = []
    seconds = []
    for step in _steps(engine, _FIRST_STEPS):
        engine.receive(step, replies.append)
        began = time.perf_counter()
        engine.run_once()
        if engine.model.device.type == "cuda":  # it computes on while the host goes on
            torch.cuda.synchronize(engine.model.device)
        seconds.append(time.perf_counter() - began)
    engine.receive(Close(_SESSION))
    engine.run_once()
    return len(engine.model.span) / statistics.median(seconds)


class Meter:
    """The throughput of a running engine; `first` is what was measured before it was started. `clock` counts seconds."""

    def __init__(self, engine: Engine, first: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._seconds = 1 / first  # of a row in a block, smoothed: what becomes slow is seen sooner than what becomes fast
        self.throughput = first  # up to noise
        self._mark()

    def update(self) -> None:
        """Take what was computed since the last measurement into account, if it is enough; measure where nothing was for a while."""
        counters = self._engine.counters
        steps, spent = counters.light_steps - self._steps, counters.light_seconds - self._spent
        measured = self._median_of_own() if self._idle else spent / steps if steps >= _ENOUGH else None
        if not measured:
            return
        old = 0.5 ** ((self._clock() - self._since) / _HALF_LIFE)
        self._seconds = old * self._seconds + (1 - old) * measured
        self._mark()
        if not 1 / _NOTICEABLE < self.throughput * self._seconds < _NOTICEABLE:
            self.throughput = 1 / self._seconds

    @property
    def _idle(self) -> bool:
        # Without a free page a session of our own would drive out somebody else's.
        return self._engine.pool.free_pages > 0 and not self._engine.active and self._clock() - self._since >= _IDLE_AFTER

    def _mark(self) -> None:
        self._steps = self._engine.counters.light_steps
        self._spent = self._engine.counters.light_seconds
        self._since = self._clock()

    def _median_of_own(self) -> float | None:
        """The seconds of a row in a block, over steps of this server's own; None when others came in between."""
        replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        seconds = []
        try:
            for step in _steps(self._engine, _ENOUGH):
                before = self._engine.counters.light_seconds
                self._engine.receive(step, replies.put)
                replies.get(timeout=_PATIENCE)
                seconds.append(self._engine.counters.light_seconds - before)
        except (queue.Empty, CapacityError):
            return None
        finally:
            self._engine.receive(Close(_SESSION))
        return statistics.median(seconds)


def _steps(engine: Engine, count: int) -> Iterator[Step]:
    model = engine.model
    settings = GenerationSettings(max_tokens_to_generate=1) if model.heads else None
    for position in range(count):
        payload = [0] if model.embeds else torch.zeros(1, model.arch.hidden, dtype=model.dtype)
        yield Step(_SESSION, position, payload, settings=settings, tokens=(0,))
