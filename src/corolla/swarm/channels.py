"""The peers that a network is connected to, or dials: what waits for each, and how they are lost and banned."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from corolla.barrier import barrier
from corolla.swarm.bans import Bans
from corolla.swarm.limits import Rate, Sparing
from corolla.swarm.network import OnLost

if TYPE_CHECKING:
    from corolla.swarm.p2p import P2PConfig

log = logging.getLogger(__name__)
log.addFilter(Sparing())


@dataclass(slots=True, eq=False)
class Channel:
    """What waits for one peer, and the tasks that carry it."""

    rate: Rate
    outbox: asyncio.Queue[tuple[list[bytes | memoryview], int]]  # frames and their bytes
    waiting: int = 0  # bytes in the outbox
    writer: asyncio.StreamWriter | None = None  # of the stream, once the peer has proved itself
    dialled: bool = False  # and not connected yet
    shown: bool = False  # the peer has done what costs it something: it sent a large frame whole, or it is announced
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Channels:
    """Used on the network's event loop alone, but for `len`.

    Attributes:
        bans: of peers that broke the protocol.
        counts: what happened to peers, by name.
        on_lost: told of peers that are lost, until `closed`.
        waiting: bytes in the outboxes of all of them.
        queues_limit: how many there may be.
    """

    def __init__(self, config: P2PConfig, loop: asyncio.AbstractEventLoop, bans: Bans) -> None:
        self.bans = bans
        self.counts: Counter[str] = Counter()
        self.on_lost: OnLost | None = None
        self.closed = False
        self.waiting = 0
        self.queues_limit = config.queues_limit
        self._config, self._loop = config, loop
        self._open: dict[str, Channel] = {}
        self._rates: dict[str, Rate] = {}  # of those connected last, so that a new connection is no new start

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Channel]:
        return iter(self._open.values())

    def __contains__(self, peer: str) -> bool:
        return peer in self._open

    def get(self, peer: str) -> Channel | None:
        return self._open.get(peer)

    def clear(self) -> None:
        """Forget all of them; nobody is told."""
        self._open.clear()
        self.waiting = 0

    def open(self, peer: str) -> Channel:
        """A channel to a peer that has none."""
        rate = self._rates.pop(peer, None) or Rate(self._config.frames_per_second)
        self._rates[peer] = rate
        if len(self._rates) > 2 * self._config.peers:
            del self._rates[next(iter(self._rates))]
        channel = self._open[peer] = Channel(rate, asyncio.Queue(self._config.queue))
        return channel

    def start(self, channel: Channel, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the channel."""
        task = self._loop.create_task(work)
        channel.tasks.add(task)
        task.add_done_callback(channel.tasks.discard)
        return task

    def hold(self, channel: Channel, size: int) -> None:
        """So many bytes more wait in a channel's outbox, or fewer. Where that is too much in all, the peer that most waits for is lost."""
        channel.waiting += size
        self.waiting += size
        if size > 0 and self.waiting > self.queues_limit:
            peer, slowest = max(self._open.items(), key=lambda entry: entry[1].waiting)
            if slowest.waiting == size == self.waiting:
                return  # one message, and nothing else waits: it may be larger
            self.lose(peer, slowest, "it takes its messages too slowly, and those of all peers wait in too much memory")

    def ban(self, peer: str, reason: str) -> None:
        """For breaking the protocol; the peer is lost, too."""
        seconds = self.bans.blame(peer)
        self.counts["banned"] += 1
        log.warning("peer %s is banned for %.0f s: %s", peer, seconds, reason, extra={"peer": peer})
        channel = self._open.get(peer)
        if channel is not None:
            self.lose(peer, channel, reason)

    def lose(self, peer: str, channel: Channel, reason: str) -> None:
        """End a channel and its tasks, and tell of it."""
        if self._open.get(peer) is not channel:
            return  # already lost, or replaced
        del self._open[peer]
        self.waiting -= channel.waiting
        channel.waiting = 0
        log.info("peer %s is lost: %s", peer, reason, extra={"peer": peer})
        current = asyncio.current_task(self._loop)
        for task in channel.tasks:
            if task is not current:
                task.cancel()
        self.tell_lost(peer)

    def tell_lost(self, peer: str) -> None:
        """The peer cannot be reached, or no longer."""
        if self.on_lost is not None and not self.closed:
            with barrier("the loss of a peer"):
                self.on_lost(peer)
