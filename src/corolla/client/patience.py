"""Where a client's sessions go, when they doubt a server, and how often they did."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from corolla.swarm.routing import Quality, Route, WantedAdapter


class Router(Protocol):
    """Chooses routes for sessions."""

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None, adapter: WantedAdapter | None = None) -> Route:
        """The route to take, around the peers of `avoid`, with room for so many tokens, of the quality `like` if there is one, over
        servers that have the `adapter` or take it. Raises `NoRoute`.
        """
        ...

    def quicker(self, route: Route, avoid: Collection[str], needed_tokens: int, adapter: WantedAdapter | None = None) -> Route | None:
        """A route that is so much quicker than `route` has become that a session should move there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When a route is doubted, in seconds."""

    silence: float = 2.0  # without progress, until the route's servers are asked whether they live
    answer: float = 1.0  # for them to say so; who does not is as good as dead
    # Without progress, until they are asked how far the session is, and again as much later. Where none got further by then, a server that
    # says it works, or says nothing, is left if others hold its blocks; what nobody works on is asked for again.
    lost: float = 20.0
    reconsider: float = 5.0  # on a route, until a quicker one is looked for
    leaving: float = 60.0  # for which a server that said it leaves, or says nothing at all, is avoided
    full: float = 10.0  # that a server is believed to be full at most, whatever it says


@dataclass(slots=True)
class ClientCounters:
    """What happened since the transport was made."""

    replays: int = 0  # histories that were sent again from the beginning
    faults: int = 0  # servers that were given up by a session
    moves: int = 0  # sessions that went on elsewhere because a server left, had become slow, was full or refused them
    lies: int = 0  # answers that no honest server gives; each is one of the faults
    full: int = 0  # times that a server had no room and another one was taken at once
    refusals: int = 0  # errors that blamed the caller, and were tried at another route
