"""Answers of servers to the PyTorch client, and what a failed answer means for the call or the session that waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from corolla.errors import CallerError, CapacityError, CorollaError, Forgotten
from corolla.messages import FailedFrame, Gap, HiddenFrame, ResultFrame, Whereabouts

Answer: TypeAlias = ResultFrame | HiddenFrame | Gap


class Fault(Exception):
    """The server `peer` failed with `error`: another one may be asked."""

    def __init__(self, peer: str, error: CorollaError) -> None:
        super().__init__(f"{peer}: {error}")
        self.peer, self.error = peer, error


class Declined(Exception):
    """The server `peer` is full, or says that what it was sent is the caller's fault: another one may do it."""

    def __init__(self, peer: str, error: CapacityError | CallerError) -> None:
        super().__init__(f"{peer}: {error}")
        self.peer, self.error = peer, error


class Forgot(Exception):
    """The server `peer` lacks what the client has, and is to be sent it again: no fault."""

    def __init__(self, peer: str, error: Forgotten) -> None:
        super().__init__(f"{peer}: {error}")
        self.peer, self.error = peer, error


class StandsStill(Exception):
    """The servers of a session live and have nothing to compute for it: a message got lost between them."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer computes nothing more for this client: why."""

    error: CorollaError


Incoming: TypeAlias = Answer | FailedFrame | Whereabouts | Lost
