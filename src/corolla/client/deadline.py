"""Waits that end, in time that this process could run."""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK = 1.0
"""Seconds: whoever waits looks at the clock at least so often."""
_STOOD_STILL = 1.0  # seconds by which a look is late, from which on this process was stopped, or its machine asleep


class Pauses:
    """Finds the time in which this process stood still (SIGSTOP, a closed lid): what others sent meanwhile waits to be read.

    Args:
        every: seconds from one look to the next, as long as this process runs.
        clock: counts seconds.
    """

    def __init__(self, every: float = LOOK, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._looked = clock()
        self._woke = float("-inf")

    def look(self) -> float:
        """Seconds since the look before, if this process stood still for a part of them, as they are far too many; else 0."""
        before, self._looked = self._looked, self._clock()
        passed = self._looked - before
        if passed - self._every <= _STOOD_STILL:
            return 0.0
        self._woke = self._looked
        return passed

    def ended_within(self, seconds: float) -> bool:
        """Whether a pause ended so lately; also where no look has found it yet. For any thread."""
        now = self._clock()
        return now - self._woke < seconds or now - self._looked - self._every > _STOOD_STILL


class Deadline:
    """`seconds` from now. The time between two looks in which this process stood still does not count."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._pauses = Pauses(clock=clock)
        self._until = clock() + seconds

    def restart(self) -> None:
        """As many seconds from now on again."""
        self._pauses.look()
        self._until = self._clock() + self._seconds

    def look(self) -> float:
        """Seconds that are left; not more than 0 when it is over. To be called every `LOOK` seconds."""
        self._until += self._pauses.look()
        return self._until - self._clock()
