"""The interface between a client and a server: who carries messages there and replies back.

Two sides implement it: `local` within one process, and peer to peer over a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from corolla.messages import Message, Reply

Deliver = Callable[[Reply], None]
"""Takes a reply; called on a thread of the transport or the engine, so it must neither block nor raise."""


class Link(Protocol):
    """One client's connection to one server."""

    def send(self, message: Message) -> None:
        """Hand a message over, without waiting for its replies.

        Raises `Busy` when the server takes no more work, a `CallerError` for a message that no server would take, and
        `NetworkError` when the server cannot be reached.
        """

    def close(self) -> None:
        """Deliver no more replies. Closing twice is no error."""


class Transport(Protocol):
    """Connects to servers by name."""

    def connect(self, peer: str, deliver: Deliver) -> Link:
        """A link to `peer` whose replies go to `deliver`. Raises `NetworkError` when there is no such peer."""
