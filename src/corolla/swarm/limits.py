"""What one peer may use of another: so many frames a second, so many bytes at a time, so many lines of the log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from corolla.errors import NetworkError


class Rate:
    """So many a second on average, `burst` at once. Nothing is refused: who is too fast is told how long to wait.

    Args:
        burst: a second's worth by default.
        clock: returns seconds that never run backwards.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic, *, burst: float | None = None) -> None:
        self._per_second, self._burst, self._clock = per_second, per_second if burst is None else burst, clock
        self._left, self._at = self._burst, clock()

    def take(self, count: float = 1) -> float:
        """Count some; returns the seconds to wait before the next, 0 while the rate is kept."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second) - count
        self._at = now
        return max(0.0, -self._left / self._per_second)

    @property
    def spent(self) -> bool:
        """Whether one more would have to wait."""
        return self._left + (self._clock() - self._at) * self._per_second < 1


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

    @property
    def each(self) -> int:
        """Bytes that one peer may have here."""
        return self._each

    def resize(self, *, each: int, total: int) -> None:
        """Other limits from here on; what is held stays."""
        self._each, self._total = each, total

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


class Sparing(logging.Filter):
    """At most one line a second of each kind, `burst` of them at once: for a logger whose lines strangers cause.

    Lines are of one kind that one call writes. The next line that is written tells how many were left out. Add it to the logger:
    `log.addFilter(Sparing())`.
    """

    def __init__(self, burst: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._burst, self._clock = burst, clock
        self._rates: dict[str, Rate] = {}  # by the text of the format, of which the program has few
        self._left_out: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.msg
        rate = self._rates.setdefault(kind, Rate(1.0, self._clock, burst=self._burst))
        if rate.spent:
            self._left_out[kind] += 1
            return False
        rate.take()
        if missing := self._left_out.pop(kind, 0):
            record.msg = f"{kind} ({missing} more of this kind were left out)"
        return True
