"""The servers of one model as the PyTorch client reaches them: the one listener of its network, shared by calls and sessions."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from corolla.barrier import barrier
from corolla.client.peers import PeerBook
from corolla.errors import InvalidSetting, NetworkError, NoRoute, ServerFault
from corolla.messages import FailedFrame, Gap, HiddenFrame, Hop, Leaving, Ping, Pong, ResultFrame, Whereabouts, WireDtype, WireMessage
from corolla.remote.incoming import Incoming, Lost
from corolla.remote.prompt_upload import GivenPrompts
from corolla.swarm.bans import Bans
from corolla.swarm.network import Network
from corolla.swarm.pings import RoundTrips
from corolla.swarm.probing import Probes
from corolla.swarm.routing import Quality, Route
from corolla.types import Span

_LOOK_AGAIN = 0.25  # seconds between two searches for a route, while there is none
_TRIED = 8  # of the busiest servers, to go around
_AS_QUICK = 2.0  # another route may take so many times as long, for a call that would wait on the best one


class SpanRouter(Protocol):
    """Chooses routes; `client.joined.KnownServers` does."""

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None) -> Route:
        """The route to take, around the peers of `avoid`, with room for so many tokens; of the quality `like` as long as servers
        of it hold every block. Raises `NoRoute`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """How servers are chosen and how long they are waited for; raises `InvalidSetting` for a value outside its range.

    Args:
        request_timeout: seconds for one server's answer, and for servers to appear that hold the blocks and have room.
        max_retries: faults of servers that one call or one step survives.
        allowed_servers: the only peers to use; None is all of them.
        blocked_servers: peers never to use.
        wire_dtype: of rows and gradients as they are sent; None sends them in their own.
        call_rows: of one call at most, in whole sequences: a larger batch goes in several, side by side.
        parallel: calls under way at once; a server takes four of one client.
        silence: seconds without an answer, until servers are asked whether they live.
        answer: seconds for them to say so; who does not is as good as dead.
        lost: seconds without an answer in a session, until its servers are asked how it is getting on; as much later one that got no
            further is left, if others hold its blocks.
        leaving: seconds for which a server that said it leaves is avoided.
        full: seconds that a server is believed to be full at most, whatever it says.
    """

    request_timeout: float = 180.0
    max_retries: int = 8
    allowed_servers: frozenset[str] | None = None
    blocked_servers: frozenset[str] = frozenset()
    wire_dtype: WireDtype | None = None
    call_rows: int = 512
    parallel: int = 4
    silence: float = 2.0
    answer: float = 1.0
    lost: float = 20.0
    leaving: float = 60.0
    full: float = 10.0

    def __post_init__(self) -> None:
        for name in ("request_timeout", "call_rows", "parallel", "silence", "answer", "lost", "leaving", "full"):
            if not getattr(self, name) > 0:
                raise InvalidSetting(name, f"{getattr(self, name)!r} is not more than 0")
        if self.max_retries < 0:
            raise InvalidSetting("max_retries", f"{self.max_retries!r} is not at least 0")
        for name in ("allowed_servers", "blocked_servers"):
            if isinstance(getattr(self, name), str):
                raise InvalidSetting(name, "give a list of peer ids")


@dataclass(frozen=True, slots=True)
class SpanRoute:
    """Servers, in order, all of one quality."""

    hops: tuple[Hop, ...]
    quality: Quality | None


class Servers:
    """One for each process and model: it listens on `network`, and every call and session asks through it. For any thread.

    Args:
        blocks: of the whole model.
    """

    def __init__(self, network: Network, router: SpanRouter, blocks: int, *, bans: Bans | None = None, config: RemoteConfig | None = None):
        self.network, self.blocks = network, blocks
        self.bans = bans or Bans()
        self.config = config or RemoteConfig()
        self.round_trips = RoundTrips(network.send)
        self.peers = PeerBook(self.config.leaving)
        self.probes = Probes(network.send)
        self.given = GivenPrompts(network.send)
        self._router = router
        self._numbers = itertools.count(1)
        self._receivers: dict[str, Callable[[str, Incoming], None]] = {}
        self._quality: Quality | None = None  # of the servers that were found last
        self._taken: Counter[str] = Counter()  # calls of ours under way
        self._lock = threading.Lock()
        self._closed = threading.Event()
        network.listen(self._receive, self._lose)

    def close(self) -> None:
        """Leave the network."""
        self._closed.set()
        self.network.close()

    def number(self) -> int:
        """A number that nobody had before."""
        return next(self._numbers)

    def hops(self, span: Span, needed_tokens: int = 0) -> tuple[Hop, ...]:
        """The servers to take for the blocks of `span`, in order: see `way`."""
        return self.way(span, needed_tokens).hops

    def way(self, span: Span, needed_tokens: int = 0) -> SpanRoute:
        """The servers to take for the blocks of `span`; of the quality of those that were found before, wherever such hold every block.

        Waits for servers that hold them and have room, and raises `NoRoute` when none have come in time.
        """
        route = self._found(needed_tokens)
        return SpanRoute(_inside(route.hops, span), route.quality)

    def take(self, span: Span) -> SpanRoute:
        """`way` for a call, past servers that compute for this client already where others of the same quality are about as quick:
        calls that are under way together go along several routes. `give_back` it when it is done."""
        best = self._found(0)
        with self._lock:
            taken, avoided = best, frozenset[str]()
            for peer, calls in self._taken.most_common(_TRIED):
                if calls < 1:
                    break
                try:
                    other = self._route(0, avoided | {peer})
                except NoRoute:
                    continue
                if other.quality == best.quality and other.seconds <= best.seconds * _AS_QUICK:
                    taken, avoided = other, avoided | {peer}
            hops = _inside(taken.hops, span)
            self._taken.update(hop.peer for hop in hops)
        return SpanRoute(hops, taken.quality)

    def give_back(self, taken: SpanRoute) -> None:
        """See `take`."""
        with self._lock:
            self._taken.subtract(hop.peer for hop in taken.hops)
            self._taken += Counter()  # who computes nothing is not kept

    def elsewhere(self, hops: Collection[Hop], span: Span, needed_tokens: int) -> tuple[Hop, ...] | None:
        """Where to go on in the place of these hops, one of which leaves; None while none does, or there is no other way."""
        leaving = self.peers.leaving
        if not any(hop.peer in leaving for hop in hops):
            return None
        try:
            return _inside(self._route(needed_tokens, leaving, stay=False).hops, span)
        except NoRoute:
            return None

    def goes_around(self, peer: str) -> bool:
        """Whether there is a route without `peer` now, over servers that are neither full nor leaving."""
        try:
            route = self._route(0, {peer}, stay=False)
        except NoRoute:
            return False
        return all(hop.peer != peer for hop in route.hops)

    def _found(self, needed_tokens: int) -> Route:
        deadline = time.monotonic() + self.config.request_timeout
        while True:
            try:
                route = self._route(needed_tokens)
            except NoRoute:
                if time.monotonic() >= deadline or self._closed.wait(_LOOK_AGAIN):
                    raise
                continue
            self._quality = route.quality
            return route

    def _route(self, needed_tokens: int, avoid: Collection[str] = (), *, stay: bool = True) -> Route:
        """Around the peers of `avoid`; around those that leave or are full too, unless there is no other way and one may `stay`."""
        banned = self.bans.banned() | frozenset(avoid)
        avoided = self.peers.avoided
        try:
            return self._router.route(_Avoided(self.config, banned | avoided), needed_tokens, self._quality)
        except NoRoute:
            if not stay or not avoided:
                raise
            return self._router.route(_Avoided(self.config, banned), needed_tokens, self._quality)

    @contextmanager
    def receiving(self, key: str, receive: Callable[[str, Incoming], None]) -> Iterator[None]:
        """Until the block ends, answers of the call or session `key` go to `receive(sender, message)`, on the network's thread."""
        with self._lock:
            self._receivers[key] = receive
        try:
            yield
        finally:
            with self._lock:
                del self._receivers[key]

    # On the network's thread from here on.

    def _receive(self, sender: str, message: WireMessage) -> None:
        with barrier("a message for the PyTorch client"), suppress(NetworkError):  # closed just now
            self._take(sender, message)

    def _take(self, sender: str, message: WireMessage) -> None:
        self.peers.hear(sender)
        self.probes.receive(sender, message)
        if isinstance(message, ResultFrame):
            self._deliver(str(message.call), sender, message)
        elif isinstance(message, (HiddenFrame, Gap, FailedFrame, Whereabouts)):
            self._deliver(message.session, sender, message)
        elif isinstance(message, Leaving):
            self.peers.leave(sender)
        elif isinstance(message, Ping):
            self.network.send(sender, Pong(message.nonce))
        elif isinstance(message, Pong):
            self.round_trips.answered(sender, message)
            if message.failing:
                self._tell_all(sender, Lost(ServerFault("its engine is dead, or stands still")))

    def _deliver(self, key: str, sender: str, message: Incoming) -> None:
        with self._lock:
            receive = self._receivers.get(key)
        if receive is not None:
            receive(sender, message)

    def _lose(self, peer: str) -> None:
        with barrier("a server's loss"), suppress(NetworkError):
            self.round_trips.forget(peer)
            self.probes.forget(peer)
            self.given.lose(peer)
            self._tell_all(peer, Lost(NetworkError(f"the connection to {peer} broke")))

    def _tell_all(self, peer: str, message: Lost) -> None:
        with self._lock:
            receivers = list(self._receivers.values())
        for receive in receivers:
            receive(peer, message)


def _inside(hops: Collection[Hop], span: Span) -> tuple[Hop, ...]:
    """What of a route lies in `span`."""
    inside = [hop for hop in hops if hop.start < span.end and span.start < hop.end]
    return tuple(Hop(hop.peer, max(hop.start, span.start), min(hop.end, span.end)) for hop in inside)


class _Avoided(Collection[str]):
    """The peers that may not be used; those that may not be named one by one are in it too."""

    def __init__(self, config: RemoteConfig, banned: frozenset[str]) -> None:
        self._allowed, self._named = config.allowed_servers, config.blocked_servers | banned

    def __contains__(self, peer: object) -> bool:
        return peer in self._named or (self._allowed is not None and peer not in self._allowed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)
