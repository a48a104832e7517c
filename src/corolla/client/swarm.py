"""The swarm as a transport: a session's link goes along a route of servers, and along another when one of them fails or leaves.

Recovery is the rule of positions and nothing else: a link whose route broke tells its session `Gap(0)`, the session sends its
history again, and that step takes a new route. What late or hung servers still send belongs to an older generation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from corolla.barrier import barrier
from corolla.client.deadline import Pauses
from corolla.client.link import SwarmLink
from corolla.client.parts import Parts
from corolla.client.patience import ClientCounters, Patience, Router
from corolla.client.peers import PeerBook
from corolla.errors import NetworkError, NoRoute, ServerFault
from corolla.messages import Cached, Close, FailedFrame, Gap, Leaving, Ping, Pong, Scores, Token, Whereabouts, WireMessage
from corolla.swarm.bans import Bans
from corolla.swarm.network import Network
from corolla.swarm.pings import RoundTrips
from corolla.swarm.probing import Probes
from corolla.swarm.routing import Quality, Route, WantedAdapter
from corolla.swarm.transport import Deliver

log = logging.getLogger(__name__)

_AFTER_PAUSE = 10.0  # seconds after this process stood still, in which connections break by its own fault
_TRUSTED = 8  # doubted peers that are tried one at a time, before all of them are


class SwarmTransport:
    """A `Transport` to whichever servers the router chooses; the peer named in `connect` does not matter.

    One for each client process: it listens on `network` and watches over its links on a thread of its own.

    Args:
        vocabulary: of the model; a server that answers with another token is at fault. None takes any token.
        timed: ask for each token's timings.
        clock: seconds, which go on while this process stands still.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.network = network
        self.router = router
        self.bans = bans or Bans()
        self.patience = patience or Patience()
        self.vocabulary, self.timed = vocabulary, timed
        self.counters = ClientCounters()
        self.round_trips = RoundTrips(network.send)
        self.peers = PeerBook(self.patience.leaving)
        self.parts = Parts(network)
        self.probes = Probes(network.send)
        self._interval = self.patience.answer / 2  # seconds between two looks of the watch
        self._pauses = Pauses(self._interval, clock)
        self._links: dict[str, SwarmLink] = {}
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
        return self.bans.banned() | self.peers.avoided

    def route(
        self,
        needed_tokens: int,
        like: Quality | None = None,
        adapter: WantedAdapter | None = None,
        around: Collection[str] = (),
    ) -> Route:
        """The router's route around the peers that are avoided and those of `around`; around doubted ones, too, as far as there is
        one. Raises `NoRoute` and `NetworkError`."""
        avoided = self.avoided | frozenset(around)
        doubted = frozenset(self.peers.doubted) - avoided
        for trusted in (frozenset[str](), *({peer} for peer in sorted(doubted)[:_TRUSTED])) if doubted else ():
            with suppress(NoRoute):
                return self.router.route(avoided | (doubted - trusted), needed_tokens, like, adapter)
        return self.router.route(avoided, needed_tokens, like, adapter)

    def enter(self, session: str, link: SwarmLink) -> None:
        with self._lock:
            self._links[session] = link

    def leave(self, link: SwarmLink) -> None:
        with self._lock:
            self._links = {session: other for session, other in self._links.items() if other is not link}

    # On the network's thread, but for the watch's.

    def _receive(self, sender: str, message: WireMessage) -> None:
        with barrier("a client's message", lambda error: self._fail_session(message, error)), suppress(NetworkError):  # closed just now
            self._take(sender, message)

    def _take(self, sender: str, message: WireMessage) -> None:
        self.peers.hear(sender)
        self.probes.receive(sender, message)
        if isinstance(message, (Token, Scores, Cached, Gap, FailedFrame)):
            if (link := self._link(message.session)) is not None:
                link.receive(sender, message)
            else:  # of an earlier life, or opened by somebody in this client's name
                self.network.send(sender, Close(message.session, message.generation))
        elif isinstance(message, Whereabouts):
            if (link := self._link(message.session)) is not None:
                link.on_status(sender, message)
        elif isinstance(message, Leaving):
            if self.peers.leave(sender):
                self._each("a server's leave", lambda link: link.on_leaving(sender))
        elif isinstance(message, Ping):
            self.network.send(sender, Pong(message.nonce))
        elif isinstance(message, Pong):
            self.round_trips.answered(sender, message)
            self.parts.arrived(sender, message)
            if message.failing:
                fault = ServerFault("its engine is dead, or stands still")
                self._each("a server's failure", lambda link: link.on_failure(sender, fault))

    def _lose(self, peer: str) -> None:
        self.round_trips.forget(peer)
        self.parts.lose(peer)
        self.probes.forget(peer)
        error = NetworkError(f"the connection to {peer} broke")
        blame = not self._pauses.ended_within(_AFTER_PAUSE)
        self._each("a server's loss", lambda link: link.on_failure(peer, error, blame=blame))

    def _link(self, session: str) -> SwarmLink | None:
        with self._lock:
            return self._links.get(session)

    def _each(self, name: str, act: Callable[[SwarmLink], None]) -> None:
        """For every session; where one cannot, it alone fails."""
        with self._lock:
            links = set(self._links.values())
        for link in links:
            with barrier(name, link.fail), suppress(NetworkError):
                act(link)

    def _fail_session(self, message: WireMessage, error: Exception) -> None:
        link = self._link(getattr(message, "session", ""))
        if link is not None:
            link.fail(error)

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            if stood := self._pauses.look():
                log.info("this process stood still for %.1f s: nobody is blamed for it", stood)
                self._each("a client's watch", SwarmLink.excuse)
            self._each("a client's watch", SwarmLink.check)
            with barrier("a client's watch"):
                self._ask(self.peers.silent)

    def _ask(self, peers: Iterable[str]) -> None:
        with suppress(NetworkError):  # closed just now
            self.round_trips.ask(peers)
