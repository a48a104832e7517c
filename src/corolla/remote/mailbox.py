"""What servers answer, waited for: one call's or one session's answers, and the signs that none will come."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from corolla.errors import CorollaError, DeadlineExceeded, Forgotten, NetworkError
from corolla.swarm.bans import blameworthy
from corolla.swarm.convert import error_of
from corolla.swarm.wire import Ask, FailedFrame, GapFrame, HiddenFrame, ResultFrame, Whereabouts

if TYPE_CHECKING:
    from corolla.remote.servers import Servers

Answer: TypeAlias = ResultFrame | HiddenFrame | GapFrame


class Fault(Exception):
    """The server `peer` failed with `error`: another one may be asked."""

    def __init__(self, peer: str, error: CorollaError) -> None:
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
    """The connection to a peer broke."""

    peer: str


Incoming: TypeAlias = Answer | FailedFrame | Whereabouts | Lost


class Mailbox:
    """What servers answer to one call, or in one session. One thread waits at a time."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._inbox: SimpleQueue[tuple[str, Incoming]] = SimpleQueue()

    def put(self, sender: str, message: Incoming) -> None:
        """For the network's thread."""
        self._inbox.put((sender, message))

    def wait(self, peers: Collection[str], generation: int = 0, session: str = "") -> tuple[str, Answer]:
        """The next answer of one of `peers`, and whose it is; those of another generation are dropped.

        Raises `Fault` when one of them fails, is gone, does not live or does not answer in time; `Forgot` when one lacks what it
        was sent once; `StandsStill` when the peers say twice that they have nothing left to compute for `session`; a `CallerError`
        or a `CapacityError` that one of them answers.
        """
        config, servers = self._servers.config, self._servers
        deadline = time.monotonic() + config.request_timeout
        since, asked = time.monotonic(), None
        lost, told, before = since + config.lost, dict[str, tuple[int, int]](), None
        while True:
            until = since + config.silence if asked is None else asked + config.answer
            try:
                sender, message = self._inbox.get(timeout=max(0.0, min(until, deadline) - time.monotonic()))
            except Empty:
                now = time.monotonic()
                if now >= deadline:
                    raise Fault(
                        min(peers, key=servers.heard), DeadlineExceeded(f"no answer came for {config.request_timeout:g} s")
                    ) from None
                if asked is None:
                    asked = now
                    servers.round_trips.ask(peers)
                    continue
                silent = [peer for peer in peers if servers.heard(peer) < asked]
                if silent:
                    silence = NetworkError(f"it did not answer for {config.silence + config.answer:g} s")
                    raise Fault(silent[0], silence) from None
                since, asked = now, None
                if session and now >= lost:
                    lost, told = now + config.lost, {}
                    for peer in peers:
                        servers.network.send(peer, Ask(session, generation))
                continue
            if sender not in peers:
                continue
            if isinstance(message, Whereabouts):
                told[sender] = message.cached, message.pending
                if message.generation == generation and len(told) == len(peers):
                    if told == before and not any(pending for _, pending in told.values()):
                        raise StandsStill
                    before = told
                continue
            if isinstance(message, Lost):
                raise Fault(sender, NetworkError(f"the connection to {sender} broke"))
            if not isinstance(message, ResultFrame) and message.generation != generation:
                continue
            if isinstance(message, FailedFrame):
                error = error_of(message)
                if isinstance(error, Forgotten):
                    raise Forgot(message.peer if message.peer in peers else sender, error)
                if blameworthy(error):
                    raise Fault(message.peer if message.peer in peers else sender, error)
                raise error
            return sender, message
