"""Sessions that clients of Petals' interface open, use and close."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field

from corolla.errors import PromptTooLong
from corolla.gateway.conversations import NotFound
from corolla.gateway.model_registry import ServedModel
from corolla.gateway.pool import PooledSession, open_session

_MOST_OF_ONE = 256  # sessions of one caller; the one that was idle longest ends for a new one


@dataclass(eq=False)
class OpenSession:
    """A session that a client opened: its tokens, and whoever holds the lock writes to it. At most `most` tokens."""

    id: str
    owner: str
    model: ServedModel
    most: int
    kept: PooledSession
    tokens: list[int] = field(default_factory=list)  # the kept session's own, or those that are to be sent with the next inputs too
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # two requests at once: one after the other


class OpenSessions:
    """The sessions that clients hold. Idle ones cost tokens in a list and nothing at servers that need the room."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, OpenSession] = OrderedDict()

    def open(self, model: ServedModel, owner: str, most: int) -> OpenSession:
        """A new one. Raises `PromptTooLong` for more tokens than the context holds."""
        if most > model.context_length:
            raise PromptTooLong(most, model.context_length)
        theirs = [session for session in self._sessions.values() if session.owner == owner]
        if len(theirs) >= _MOST_OF_ONE:
            self.close(theirs[0])
        session = OpenSession(str(uuid.uuid4()), owner, model, most, open_session(model, owner))
        self._sessions[session.id] = session
        return session

    def get(self, session: str, owner: str) -> OpenSession:
        """Raises `NotFound`."""
        found = self._sessions.get(session)
        if found is None or found.owner != owner:
            raise NotFound("session")
        self._sessions.move_to_end(session)
        return found

    def close(self, session: OpenSession) -> None:
        """It is over; its servers free its pages. Closing twice is no error."""
        if self._sessions.pop(session.id, None) is not None:
            session.kept.close()

    def close_all(self) -> None:
        for session in list(self._sessions.values()):
            self.close(session)
