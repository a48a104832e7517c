"""Messages on their way to an engine's thread."""

from __future__ import annotations

import threading
from collections import deque

from corolla.engine.sequence import Deliver
from corolla.errors import CorollaError
from corolla.types import Message, Step


class Inbox:
    """Filled on any thread, emptied on the engine's. `None` beside a message that is not a step: it has no replies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[tuple[Message, Deliver | None]] = deque()
        self._closed: CorollaError | None = None

    def __len__(self) -> int:
        return len(self._messages)

    def rows_of(self, session: str) -> int:
        """How many rows of a session wait here."""
        with self._lock:
            return sum(len(message.payload) for message, _ in self._messages if isinstance(message, Step) and message.session == session)

    def put(self, message: Message, deliver: Deliver | None) -> None:
        """Raises the error that the inbox was closed with, for a step; nothing else is of use to a closed one."""
        with self._lock:
            if self._closed is None:
                self._messages.append((message, deliver))
            elif isinstance(message, Step):
                raise self._closed

    def take(self) -> tuple[Message, Deliver | None] | None:
        """The oldest message, if there is one."""
        with self._lock:
            return self._messages.popleft() if self._messages else None

    def close(self, error: CorollaError) -> list[tuple[Message, Deliver | None]]:
        """Take nothing more; returns what nobody has taken yet."""
        with self._lock:
            self._closed = self._closed or error
            left = list(self._messages)
            self._messages.clear()
            return left
