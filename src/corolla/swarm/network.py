"""The seam between peers: who carries wire messages from one peer to another.

Two sides implement it: `LocalNetwork` within one process, and `p2p.P2PNetwork` over hivemind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Protocol

from corolla.errors import NetworkError
from corolla.swarm import frames
from corolla.swarm.wire import Unknown, WireMessage

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


class LocalHub:
    """The peers of one process. `kill`, `freeze`, `part` and `drop_next` are what tests break it with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peers: dict[str, LocalNetwork] = {}
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
        """End a peer as a power cut would: the others only notice that it is gone."""
        with self._lock:
            gone = self._peers.pop(peer, None)
            others = list(self._peers.values())
        if gone is not None:
            gone.stop()
        for other in others:
            other.lose(peer)

    def freeze(self, peer: str) -> None:
        """Swallow all that a peer sends from now on, as if it hung: nobody is told."""
        self._frozen.add(peer)

    def part(self, one: str, other: str) -> None:
        """From now on two peers cannot reach one another; both notice."""
        self._parted |= {(one, other), (other, one)}
        with self._lock:
            pair = [(self._peers[one], other), (self._peers[other], one)]
        for network, lost in pair:
            network.lose(lost)

    def drop_next(self, sender: str, receiver: str) -> None:
        """Lose the next message from one peer to another, as when its stream breaks and both live on."""
        self._dropping.add((sender, receiver))

    def carry(self, sender: str, receiver: str, message: WireMessage) -> None:
        with self._lock:
            source, target = self._peers.get(sender), self._peers.get(receiver)
        if source is None:
            raise NetworkError(f"the network of {sender} is closed")
        if sender in self._frozen:
            return
        if (sender, receiver) in self._dropping:
            self._dropping.remove((sender, receiver))
            return
        if target is None or (sender, receiver) in self._parted:
            source.lose(receiver)
        else:
            # Through bytes, so that what works here works between machines; a frame's length goes before it.
            encoded = memoryview(b"".join(frames.encode(message)))
            decoded = frames.decode(encoded[frames.LENGTH.size :])
            assert not isinstance(decoded, Unknown), "one process speaks one version"
            target.put(sender, decoded)


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
            job()
