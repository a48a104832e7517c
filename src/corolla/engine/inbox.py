"""Messages on their way to an engine's thread, within the bytes that clients may have there."""

from __future__ import annotations

import threading
from collections import Counter, deque

import torch

from corolla.engine.budgets import Ledger
from corolla.engine.sequence import Deliver
from corolla.errors import CorollaError
from corolla.messages import Message
from corolla.types import Step

MESSAGE_BYTES, TOKEN_BYTES = 4096, 40  # what a message takes beside its rows, and a token id


def size_of(step: Step) -> int:
    """Bytes that a step takes until it is computed."""
    rows, tokens = (step.payload.nbytes, len(step.tokens)) if isinstance(step.payload, torch.Tensor) else (0, len(step.payload))
    return MESSAGE_BYTES + rows + TOKEN_BYTES * tokens


class Inbox:
    """Filled on any thread, emptied on the engine's. `None` beside a message that is not a step: it has no replies.

    What is in it is charged to the `ledger`; for a step that was taken out, whoever took it gives that back.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._messages: deque[tuple[Message, Deliver | None]] = deque()
        self._steps: Counter[tuple[str, str]] = Counter()  # by client and session
        self._sessions: Counter[str] = Counter()  # that have steps here, by client
        self._closed: CorollaError | None = None

    @property
    def sessions(self) -> int:
        """How many sessions have steps here."""
        return len(self._steps)

    def sessions_of(self, client: str) -> int:
        """How many sessions of one client have steps here."""
        return self._sessions[client]

    @property
    def clients(self) -> set[str]:
        """Who has steps here."""
        with self._lock:
            return set(self._sessions)

    def __len__(self) -> int:
        return len(self._messages)

    def rows_of(self, session: str) -> int:
        """How many rows of a session wait here."""
        with self._lock:
            return sum(len(message.payload) for message, _ in self._messages if isinstance(message, Step) and message.session == session)

    def put(self, message: Message, deliver: Deliver | None) -> None:
        """Raises the error that the inbox was closed with, for a step (nothing else is of use to a closed one), and `Busy`."""
        with self._lock:
            if isinstance(message, Step):
                if self._closed is not None:
                    raise self._closed
                self._ledger.take(message.client, size_of(message))
                self._sessions[message.client] += (message.client, message.session) not in self._steps
                self._steps[message.client, message.session] += 1
            if self._closed is None:
                self._messages.append((message, deliver))

    def take(self) -> tuple[Message, Deliver | None] | None:
        """The oldest message, if there is one."""
        with self._lock:
            if not self._messages:
                return None
            message, deliver = self._messages.popleft()
            if isinstance(message, Step):
                self._steps[message.client, message.session] -= 1
                if not self._steps[message.client, message.session]:
                    del self._steps[message.client, message.session]
                    self._sessions[message.client] -= 1
                    if not self._sessions[message.client]:
                        del self._sessions[message.client]
            return message, deliver

    def close(self, error: CorollaError) -> list[tuple[Message, Deliver | None]]:
        """Take nothing more; returns what nobody has taken yet."""
        with self._lock:
            self._closed = self._closed or error
            left = list(self._messages)
            self._messages.clear()
            self._steps.clear()
            self._sessions.clear()
        for message, _ in left:
            if isinstance(message, Step):
                self._ledger.give_back(message.client, size_of(message))
        return left
