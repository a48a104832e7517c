"""Whether a server can go on: looked at again and again, apart from whatever else the server does."""

from __future__ import annotations

import threading
from collections.abc import Callable

from corolla.barrier import barrier


class HealthWatch:
    """Asks `find` every `every` seconds why the server is dead; the first reason is handed to `on_failure`, once, and kept.

    Both are called on a thread of the watch. `find` gives None as long as the server lives.
    """

    def __init__(self, find: Callable[[], str | None], on_failure: Callable[[str], None], every: float) -> None:
        self._find, self._on_failure, self._every = find, on_failure, every
        self._ended = threading.Event()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="corolla-health", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still looks, or tells."""
        return self._thread.is_alive()

    def end(self) -> None:
        """Look no more."""
        self._ended.set()

    def _run(self) -> None:
        while self.failure is None and not self._ended.wait(self._every):
            with barrier("the health watch"):
                self.failure = self._find()
        if self.failure is not None:
            with barrier("the health watch"):
                self._on_failure(self.failure)
