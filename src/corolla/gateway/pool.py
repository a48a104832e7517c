"""Idle sessions, kept for whoever goes on from what they hold: the next turn of a conversation, or an interface without sessions."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.client.session import Session
from corolla.gateway.interruptible import InterruptibleTransport
from corolla.gateway.model_registry import ServedModel

if TYPE_CHECKING:
    from corolla.models.prompts import SoftPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    idle: int = 64  # sessions; servers may forget theirs earlier, when they need the room
    seconds: float = 600.0  # that a session stays idle


@dataclass(slots=True, eq=False)
class PooledSession:
    """A session of one caller (`owner`) with one model, and the transport that interrupts it."""

    session: Session
    transport: InterruptibleTransport
    model: str
    owner: str
    used: float = 0.0

    def close(self) -> None:
        """Its servers free its pages."""
        self.session.close()


class SessionPool:
    """Sessions between answers, for any thread. One caller's sessions are never given to another one."""

    def __init__(self, config: PoolConfig | None = None) -> None:
        self._config = config or PoolConfig()
        self._lock = threading.Lock()
        self._idle: list[PooledSession] = []  # the longest idle first

    @property
    def size(self) -> int:
        """Idle sessions."""
        return len(self._idle)

    def take(self, model: ServedModel, owner: str, tokens: Sequence[int], soft: SoftPrompt | None = None) -> PooledSession:
        """The idle session that saves most of `tokens`, or a new one. Raises `NetworkError`.

        A session of which less than half is of use stays for the branch that it belongs to.
        """
        with self._lock:
            fitting = [
                kept for kept in self._idle if kept.owner == owner and kept.model == model.name and _serves(kept.session, tokens, soft)
            ]
            best = max(fitting, key=lambda kept: kept.session.common_prefix([*kept.session.prefix, *tokens]), default=None)
            if best is not None:
                self._idle.remove(best)
        if best is None:
            return open_session(model, owner, soft)
        return best

    def give_back(self, kept: PooledSession) -> None:
        """The session's answer has ended; what it holds may be of use again."""
        kept.used = time.monotonic()
        kept.transport.on_restart = None
        with self._lock:
            self._idle.append(kept)
        self.prune()

    def prune(self) -> None:
        """Close what has been idle for too long, or is one too many."""
        with self._lock:
            since = time.monotonic() - self._config.seconds
            kept = [each for each in self._idle if each.used > since][-self._config.idle :]
            closing = [each for each in self._idle if each not in kept]
            self._idle = kept
        for each in closing:
            each.close()

    def close(self) -> None:
        """Close all idle sessions."""
        with self._lock:
            closing, self._idle = self._idle, []
        for each in closing:
            each.close()


def open_session(model: ServedModel, owner: str, soft: SoftPrompt | None = None) -> PooledSession:
    """A new session. Raises `NetworkError`."""
    transport = InterruptibleTransport(model.transport)
    return PooledSession(Session(transport, model.peer, soft), transport, model.name, owner)


def _serves(session: Session, tokens: Sequence[int], soft: SoftPrompt | None) -> bool:
    """Whether at least half of the session's history is of use."""
    if (session.prompt and session.prompt.digest) != (soft and soft.digest):
        return False
    known = session.tokens[len(session.prefix) :]
    half = (len(known) + 1) // 2
    return 0 < half <= len(tokens) and known[:half] == list(tokens[:half])
