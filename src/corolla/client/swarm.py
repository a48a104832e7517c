"""The swarm as a transport: a session's link goes along a route of servers, and along another when one of them fails or leaves.

Recovery is the rule of positions and nothing else: a link whose route broke tells its session `Gap(0)`, the session sends its
history again, and that step takes a new route. What late or hung servers still send belongs to an older generation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from corolla.client.link import SwarmLink
from corolla.errors import NetworkError
from corolla.swarm.bans import Bans
from corolla.swarm.convert import from_adapter_part, from_prompt_part
from corolla.swarm.network import Network
from corolla.swarm.pings import RoundTrips
from corolla.swarm.routing import Quality, Route, WantedAdapter
from corolla.swarm.transport import Deliver
from corolla.swarm.wire import (
    CachedFrame,
    FailedFrame,
    GapFrame,
    Leaving,
    Ping,
    Pong,
    ScoresFrame,
    TokenFrame,
    Whereabouts,
    WireMessage,
)
from corolla.types import AdapterPart, PromptPart, Span

_SLOWEST = 128 * 2**10  # bytes a second that every link between peers carries, as in `swarm.p2p`
_OWN_PINGS = 2**32  # and above: those that do not measure a round trip


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

    silence: float = 2.0  # without a reply, until the route's servers are asked whether they live
    answer: float = 1.0  # for them to say so; who does not is as good as dead
    lost: float = 20.0  # without a reply, until they are asked, twice, how the session is getting on
    reconsider: float = 5.0  # on a route, until a quicker one is looked for
    leaving: float = 60.0  # for which a server that said it leaves, or says nothing at all, is avoided


@dataclass(slots=True)
class ClientCounters:
    """What happened since the transport was made."""

    replays: int = 0  # histories that were sent again from the beginning
    faults: int = 0  # servers that were given up by a session
    moves: int = 0  # sessions that went on elsewhere because a server left or had become slow


class SwarmTransport:
    """A `Transport` to whichever servers the router chooses; the peer named in `connect` does not matter.

    One for each client process: it listens on `network` and watches over its links on a thread of its own.

    Args:
        vocabulary: of the model; a server that answers with another token is at fault. None takes any token.
        timed: ask for each token's timings.
    """

    def __init__(
        self,
        network: Network,
        router: Router,
        *,
        bans: Bans | None = None,
        patience: Patience | None = None,
        vocabulary: int | None = None,
        timed: bool = False,
    ) -> None:
        self.network = network
        self.router = router
        self.bans = bans or Bans()
        self.patience = patience or Patience()
        self.vocabulary, self.timed = vocabulary, timed
        self.counters = ClientCounters()
        self.round_trips = RoundTrips(network.send)
        self._links: dict[str, SwarmLink] = {}
        self._heard: dict[str, float] = {}  # when a peer last sent anything
        self._leaving: dict[str, float] = {}  # when a peer said that it leaves
        self._silent: dict[str, float] = {}  # when a peer was given up because nothing came from it
        self._given: dict[str, set[tuple[str, Span]]] = {}  # soft prompts and adapters by name, for which blocks, that a peer should have
        # Until when adapters may be on their way to a peer, and the ping behind the last of them.
        self._carrying: dict[str, tuple[float, int]] = {}
        self._pings = count(_OWN_PINGS)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        network.listen(self._receive, self._lose)
        threading.Thread(target=self._watch, name="corolla-watch", daemon=True).start()

    def connect(self, peer: str, deliver: Deliver) -> SwarmLink:
        """See `Transport.connect`."""
        return SwarmLink(self, deliver)

    def close(self) -> None:
        """Leave the network; links deliver nothing more."""
        self._closed.set()
        self.network.close()

    @property
    def avoided(self) -> frozenset[str]:
        """The peers that no session should go to now."""
        since = time.monotonic() - self.patience.leaving
        return self.bans.banned() | self._silent.keys() | {peer for peer, said in list(self._leaving.items()) if said > since}

    def heard(self, peer: str) -> float:
        """When `peer` last sent anything, on `time.monotonic`'s clock; minus infinity if never."""
        return self._heard.get(peer, float("-inf"))

    def silent(self, peer: str) -> None:
        """Nothing came from `peer`: it is avoided until something does, or long enough for its record to expire."""
        self._silent[peer] = time.monotonic()

    def give(self, peer: str, part: PromptPart) -> None:
        """Send a soft prompt to `peer`, unless it should have it."""
        given = self._given.setdefault(peer, set())
        if (part.name.name, part.span) not in given:
            given.add((part.name.name, part.span))
            self.network.send(peer, from_prompt_part(part))

    def give_adapter(self, peer: str, part: AdapterPart) -> None:
        """Send an adapter, or a part of it, to `peer`, unless it should have it."""
        given = self._given.setdefault(peer, set())
        if (part.digest, part.span) in given:
            return
        given.add((part.digest, part.span))
        until, nonce = max(time.monotonic(), self._carrying.get(peer, (0.0, 0))[0]), next(self._pings)
        for frame in from_adapter_part(part):
            until += frame.hidden.nbytes / _SLOWEST
            self._carrying[peer] = until, nonce
            self.network.send(peer, frame)
        self.network.send(peer, Ping(nonce))

    def carrying(self, peer: str) -> bool:
        """Whether an adapter may still be on its way to `peer`, which answers nothing until it is there."""
        return self._carrying.get(peer, (0.0, 0))[0] > time.monotonic()

    def lacks_parts(self, peer: str) -> None:
        """`peer` has forgotten what it was given."""
        self._given.pop(peer, None)

    def enter(self, session: str, link: SwarmLink) -> None:
        with self._lock:
            self._links[session] = link

    def leave(self, link: SwarmLink) -> None:
        with self._lock:
            self._links = {session: other for session, other in self._links.items() if other is not link}

    def _receive(self, sender: str, message: WireMessage) -> None:
        self._heard[sender] = time.monotonic()
        self._silent.pop(sender, None)
        if isinstance(message, (TokenFrame, ScoresFrame, CachedFrame, GapFrame, FailedFrame)):
            with self._lock:
                link = self._links.get(message.session)
            if link is not None:
                link.receive(sender, message)
        elif isinstance(message, Whereabouts):
            with self._lock:
                link = self._links.get(message.session)
            if link is not None:
                link.told(sender, message)
        elif isinstance(message, Leaving):
            self._leaving[sender] = time.monotonic()
            for link in self._all():
                link.left(sender)
        elif isinstance(message, Ping):
            self.network.send(sender, Pong(message.nonce))
        elif isinstance(message, Pong):
            self.round_trips.answered(sender, message)
            if self._carrying.get(sender, (0.0, 0))[1] == message.nonce:
                self._carrying.pop(sender, None)

    def _lose(self, peer: str) -> None:
        self.round_trips.forget(peer)
        self.lacks_parts(peer)
        self._carrying.pop(peer, None)
        for link in self._all():
            link.lost(peer, NetworkError(f"the connection to {peer} broke"))

    def _all(self) -> list[SwarmLink]:
        with self._lock:
            return list(self._links.values())

    def _watch(self) -> None:
        while not self._closed.wait(self.patience.answer / 2):
            now = time.monotonic()
            for link in self._all():
                link.check(now)
            self._silent = {peer: since for peer, since in self._silent.items() if now - since < self.patience.leaving}
            self._ask(self._silent)

    def _ask(self, peers: Iterable[str]) -> None:
        with suppress(NetworkError):  # closed just now
            self.round_trips.ask(peers)
