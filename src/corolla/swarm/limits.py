"""What one peer may use of another: so many frames a second, so many bytes at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from corolla.errors import NetworkError


class Rate:
    """So many a second on average, a second's worth at once. Nothing is refused: who is too fast is told how long to wait.

    `clock` returns seconds that never run backwards.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._left, self._at = per_second, clock()

    def take(self) -> float:
        """Count one; returns the seconds to wait before the next, 0 while the rate is kept."""
        now = self._clock()
        self._left = min(self._per_second, self._left + (now - self._at) * self._per_second) - 1
        self._at = now
        return max(0.0, -self._left / self._per_second)


class Room:
    """Bytes that are held for peers: at most `each` for one of them and `total` for all."""

    def __init__(self, *, each: int, total: int) -> None:
        self._each, self._total = each, total
        self._held: Counter[str] = Counter()
        self._sum = 0

    @property
    def held(self) -> int:
        """Bytes that are held now, for all peers."""
        return self._sum

    def take(self, peer: str, count: int) -> None:
        """Hold `count` more bytes for `peer`. Raises `NetworkError`, and holds no more, where that is above a limit."""
        if self._held[peer] + count > self._each:
            raise NetworkError(f"more than {self._each} bytes of it are under way at once")
        if self._sum + count > self._total:
            raise NetworkError(f"more than {self._total} bytes of all peers are under way at once: try again")
        self._held[peer] += count
        self._sum += count

    def give(self, peer: str, count: int) -> None:
        """Hold `count` bytes less."""
        self._held[peer] -= count
        self._sum -= count
        if not self._held[peer]:
            del self._held[peer]
