"""The swarm as a transport: a session's link goes along a route of servers, and along another when one of them fails.

Recovery is the rule of positions and nothing else: a link whose route broke tells its session `Gap(0)`, the session sends its
history again, and that step takes a new route. What late or hung servers still send belongs to an older generation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from corolla.errors import NetworkError
from corolla.swarm.bans import Bans, blameworthy
from corolla.swarm.convert import error_of, from_message, from_settings, to_reply
from corolla.swarm.network import Network
from corolla.swarm.routing import Route
from corolla.swarm.transport import Deliver
from corolla.swarm.wire import MAX_STEP_TOKENS, CachedFrame, FailedFrame, GapFrame, Hop, Ping, Pong, StepFrame, TokenFrame, WireMessage
from corolla.types import Close, Gap, Message, Step

log = logging.getLogger(__name__)

FindRoute = Callable[[Collection[str], int], Route]
"""Given banned peers and the tokens that need room: the route to take. Raises `NoRoute`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When a silent route is doubted, in seconds."""

    silence: float = 2.0  # without a reply, until the route's servers are asked whether they live
    answer: float = 1.0  # for them to say so; who does not is as good as dead


class SwarmTransport:
    """A `Transport` to whichever servers `find_route` chooses; the peer named in `connect` does not matter.

    One for each client process: it listens on `network` and watches over its links on a thread of its own.
    """

    def __init__(self, network: Network, find_route: FindRoute, *, bans: Bans | None = None, patience: Patience | None = None) -> None:
        self.network = network
        self.find_route = find_route
        self.bans = bans or Bans()
        self.patience = patience or Patience()
        self._links: dict[str, SwarmLink] = {}
        self._heard: dict[str, float] = {}  # when a peer last sent anything
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

    def heard(self, peer: str) -> float:
        """When `peer` last sent anything, on `time.monotonic`'s clock; minus infinity if never."""
        return self._heard.get(peer, float("-inf"))

    def enter(self, session: str, link: SwarmLink) -> None:
        with self._lock:
            self._links[session] = link

    def leave(self, link: SwarmLink) -> None:
        with self._lock:
            self._links = {session: other for session, other in self._links.items() if other is not link}

    def _receive(self, sender: str, message: WireMessage) -> None:
        self._heard[sender] = time.monotonic()
        if isinstance(message, (TokenFrame, CachedFrame, GapFrame, FailedFrame)):
            with self._lock:
                link = self._links.get(message.session)
            if link is not None:
                link.receive(sender, message)
        elif isinstance(message, Ping):
            self.network.send(sender, Pong(message.nonce))

    def _lose(self, peer: str) -> None:
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


class SwarmLink:
    """One session's way through the swarm. See `transport.Link`."""

    def __init__(self, transport: SwarmTransport, deliver: Deliver) -> None:
        self._transport = transport
        self._deliver = deliver
        self._lock = threading.RLock()
        self._route: Route | None = None
        self._step: Step | None = None  # under way
        self._since = 0.0  # when the last reply to it came, or it was sent
        self._asked: float | None = None  # when the route's servers were asked whether they live

    @property
    def route(self) -> Route | None:
        """The servers of the session, if it has any at the moment."""
        return self._route

    def send(self, message: Message) -> None:
        """See `Link.send`; also raises `NoRoute` while some block has no server."""
        with self._lock:
            if isinstance(message, Step):
                self._transport.enter(message.session, self)
                self._send_step(message)
                return
            self._step = None
            for peer in self._route.peers if self._route is not None else ():
                self._transport.network.send(peer, from_message(message))
            if isinstance(message, Close):
                self._transport.leave(self)

    def close(self) -> None:
        """See `Link.close`."""
        self._step = None
        self._transport.leave(self)

    def receive(self, sender: str, frame: TokenFrame | CachedFrame | GapFrame | FailedFrame) -> None:
        """A reply from a server of the route; replies to earlier steps are dropped."""
        with self._lock:
            step = self._step
            if step is None or frame.generation != step.generation or isinstance(frame, CachedFrame):
                return
            self._since, self._asked = time.monotonic(), None
            if isinstance(frame, FailedFrame) and blameworthy(error := error_of(frame)):
                self.lost(frame.peer or sender, error)
                return
            if isinstance(frame, FailedFrame) or (isinstance(frame, TokenFrame) and frame.finish is not None):
                self._step = None
            self._transport.bans.forgive(sender)
        self._deliver(to_reply(frame))

    def lost(self, peer: str, error: Exception) -> None:
        """A server failed: if it is one of ours, the session is told to send its history again."""
        with self._lock:
            if self._route is None or peer not in self._route.peers:
                return
            seconds = self._transport.bans.blame(peer)
            log.warning("server %s is left for %.0f s: %s", peer, seconds, error)
            self._abandon()
            step, self._step = self._step, None
        if step is not None:
            self._deliver(Gap(step.session, step.generation, 0))

    def check(self, now: float) -> None:
        """Ask a silent route's servers whether they live, and give up those that do not say so."""
        patience, transport = self._transport.patience, self._transport
        with self._lock:
            if self._step is None or self._route is None:
                return
            if self._asked is None:
                if now - self._since > patience.silence:
                    self._asked = now
                    for peer in self._route.peers:
                        transport.network.send(peer, Ping(0))
                return
            if now - self._asked < patience.answer:
                return
            silent = [peer for peer in self._route.peers if transport.heard(peer) < self._asked]
            self._since, self._asked = now, None
        for peer in silent:
            self.lost(peer, NetworkError(f"it did not answer for {patience.silence + patience.answer:g} s"))

    def _send_step(self, step: Step) -> None:
        tokens = tuple(step.payload)
        if self._route is None:
            self._route = self._transport.find_route(self._transport.bans.banned(), step.start + len(tokens))
            if step.start:
                # Nobody on a new route has anything of the session.
                self._deliver(Gap(step.session, step.generation, 0))
                return
        hops = tuple(Hop(hop.peer, hop.start, hop.end) for hop in self._route.hops)
        self._step, self._since, self._asked = step, time.monotonic(), None
        settings = from_settings(step.settings) if step.settings is not None else None
        for first in range(0, len(tokens), MAX_STEP_TOKENS):
            piece = tokens[first : first + MAX_STEP_TOKENS]
            frame = StepFrame(
                step.session,
                step.generation,
                step.start + first,
                piece,
                settings=settings if first + len(piece) == len(tokens) else None,
                route=hops,
                client=self._transport.network.me,
                adapter=step.adapter,
            )
            self._transport.network.send(hops[0].peer, frame)

    def _abandon(self) -> None:
        """Let go of the route: its servers are told, as far as they hear."""
        route, self._route = self._route, None
        if route is None or self._step is None:
            return
        for peer in route.peers:
            try:
                self._transport.network.send(peer, from_message(Close(self._step.session)))
            except NetworkError:
                return
