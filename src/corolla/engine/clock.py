"""Time as an engine counts it: without the hours in which its process or its machine slept."""

from __future__ import annotations

import threading
import time

AT_MOST = 10.0  # seconds that pass between two looks at the clock, of those who look at it again and again


class AwakeClock:
    """Seconds since it was made, of which no more than `AT_MOST` pass between two calls of `now`. For any thread.

    After a SIGSTOP or a suspended laptop nobody has been silent for as long as the wall's clock says: what was sent meanwhile still waits
    to be read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen, self._awake = time.monotonic(), 0.0

    def now(self) -> float:
        with self._lock:
            seen = time.monotonic()
            self._awake += min(seen - self._seen, AT_MOST)
            self._seen = seen
            return self._awake
