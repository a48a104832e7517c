"""The interface between peers: who carries wire messages from one peer to another.

Two sides implement it: `LocalNetwork` within one process, and `p2p.P2PNetwork` over hivemind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Protocol

from corolla.barrier import barrier
from corolla.errors import NetworkError
from corolla.messages import Unknown, WireMessage
from corolla.swarm import frames

OnMessage = Callable[[str, WireMessage], None]
"""Takes (sender's id, message); called on the network's thread, so it must return quickly."""
OnLost = Callable[[str], None]
"""Takes the id of a peer that cannot be reached, or no longer."""


class Network(Protocol):
    """One peer's way to all others."""

    @property
    def me(self) -> str:
        """This peer's id."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What happened to peers since the start, by name."""
        ...

    def listen(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """Where messages and losses go from now on; called before the first `send`. A second call takes the first one's place."""

    def send(self, peer: str, message: WireMessage) -> None:
        """Hand a message over, from any thread, without waiting; a peer that cannot be reached is reported to `on_lost`.

        Messages to one peer arrive in order. Raises `NetworkError` when this network is closed.
        """

    def send_all(self, messages: Sequence[tuple[str, WireMessage]]) -> None:
        """The same for several messages, as (peer, message): those to one peer travel together."""

    def close(self) -> None:
        """Leave: nothing is delivered after this. Closing twice is no error."""


Intercept = Callable[[str, str, WireMessage], Sequence[tuple[float, WireMessage]]]
"""What becomes of a message on its way from a sender to a receiver: messages to deliver, each after so many seconds."""


class LocalHub:
    """The peers of one process. Like a real network it tells of a death only the peers that are connected: two peers are
    from the first message between them on, and whoever sends to a peer that is gone is told then.

    `kill`, `freeze`, `part`, `drop_next` and `intercept` are what tests break it with.
    """

    def __init__(self) -> None:
        self.intercept: Intercept | None = None
        self._lock = threading.Lock()
        self._peers: dict[str, LocalNetwork] = {}
        self._connected: set[frozenset[str]] = set()
        self._frozen: set[str] = set()
        self._parted: set[tuple[str, str]] = set()
        self._dropping: set[tuple[str, str]] = set()

    def join(self, peer: str) -> LocalNetwork:
        """A network for a new peer of that id."""
        network = LocalNetwork(self, peer)
        with self._lock:
            self._peers[peer] = network
        return network

    def kill(self, peer: str) -> None:
        """End a peer as a power cut would: those that are connected to it notice that it is gone."""
        with self._lock:
            gone = self._peers.pop(peer, None)
            others = [network for name, network in self._peers.items() if frozenset((peer, name)) in self._connected]
            self._connected = {pair for pair in self._connected if peer not in pair}
        if gone is not None:
            gone.stop()
        for other in others:
            other.lose(peer)

    def freeze(self, peer: str) -> None:
        """Swallow all that a peer sends from now on, as if it hung: nobody is told."""
        self._frozen.add(peer)

    def part(self, one: str, other: str) -> None:
        """From now on two peers cannot reach one another; if they are connected, both notice."""
        self._parted |= {(one, other), (other, one)}
        with self._lock:
            pair = [(self._peers[one], other), (self._peers[other], one)]
            connected = frozenset((one, other)) in self._connected
            self._connected.discard(frozenset((one, other)))
        for network, lost in pair if connected else ():
            network.lose(lost)

    def drop_next(self, sender: str, receiver: str) -> None:
        """Lose the next message from one peer to another, as when its stream breaks and both live on."""
        self._dropping.add((sender, receiver))

    def carry(self, sender: str, receiver: str, message: WireMessage) -> None:
        with self._lock:
            source = self._peers.get(sender)
        if source is None:
            raise NetworkError(f"the network of {sender} is closed")
        if sender in self._frozen:
            return
        if (sender, receiver) in self._dropping:
            self._dropping.remove((sender, receiver))
            return
        intercept = self.intercept
        for seconds, each in [(0.0, message)] if intercept is None else intercept(sender, receiver, message):
            if seconds:
                late = threading.Timer(seconds, self._deliver, (source, receiver, each))
                late.daemon = True
                late.start()
            else:
                self._deliver(source, receiver, each)

    def _deliver(self, source: LocalNetwork, receiver: str, message: WireMessage) -> None:
        with self._lock:
            target = self._peers.get(receiver)
            reached = target is not None and (source.me, receiver) not in self._parted
            if reached:
                self._connected.add(frozenset((source.me, receiver)))
        if target is None or not reached:
            source.lose(receiver)
            return
        # Through bytes, so that what works here works between machines; a frame's length goes before it.
        encoded = memoryview(b"".join(frames.encode(message)))
        decoded = frames.decode(encoded[frames.LENGTH.size :])
        assert not isinstance(decoded, Unknown), "one process speaks one version"
        target.put(source.me, decoded)


class LocalNetwork:
    """A `Network` to the peers of one hub; messages are handled on a thread of its own."""

    def __init__(self, hub: LocalHub, me: str) -> None:
        self._hub, self._me = hub, me
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._on_message: OnMessage | None = None
        self._on_lost: OnLost | None = None
        self._thread = threading.Thread(target=self._run, name=f"corolla-{me}", daemon=True)

    @property
    def me(self) -> str:
        return self._me

    @property
    def counts(self) -> Mapping[str, int]:
        """Nothing: nobody is banned within one process."""
        return {}

    def listen(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """See `Network.listen`."""
        started = self._on_message is not None
        self._on_message, self._on_lost = on_message, on_lost
        if not started:
            self._thread.start()

    def send(self, peer: str, message: WireMessage) -> None:
        """See `Network.send`."""
        self._hub.carry(self._me, peer, message)

    def send_all(self, messages: Sequence[tuple[str, WireMessage]]) -> None:
        """See `Network.send_all`."""
        for peer, message in messages:
            self.send(peer, message)

    def close(self) -> None:
        """See `Network.close`."""
        self._hub.kill(self._me)

    def put(self, sender: str, message: WireMessage) -> None:
        on_message = self._on_message
        if on_message is not None:
            self._inbox.put(lambda: on_message(sender, message))

    def lose(self, peer: str) -> None:
        on_lost = self._on_lost
        if on_lost is not None:
            self._inbox.put(lambda: on_lost(peer))

    def stop(self) -> None:
        self._inbox.put(None)

    def _run(self) -> None:
        while (job := self._inbox.get()) is not None:
            with barrier(f"the network of {self._me}"):
                job()
