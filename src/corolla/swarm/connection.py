"""Connections of one network to its peers: what waits for each, streams that peers open, and frames as they come in."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from corolla.barrier import barrier
from corolla.errors import CorollaError, ProtocolError, Unauthorized
from corolla.swarm import frames
from corolla.swarm.bans import Bans
from corolla.swarm.limits import Rate, Room, Sparing
from corolla.swarm.network import OnLost

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

log = logging.getLogger(__name__)
log.addFilter(Sparing())


@dataclass(frozen=True, slots=True, kw_only=True)
class P2PConfig:
    """What two peers agree on, and what one may take of the other. What honest peers use of it: docs/security.md."""

    secret: bytes | None = None  # None is an open swarm
    dial_timeout: float = 5.0  # seconds, the handshake included
    handshake_timeout: float = 10.0  # seconds for who dials us: longer than it takes to give up
    write_timeout: float = 10.0  # seconds until a peer that reads nothing is as good as dead; `slowest` adds to it
    frame_timeout: float = 20.0  # seconds for the rest of a frame once it began; `slowest` adds to it
    slowest: int = 128 * 2**10  # bytes a second that every link between peers carries
    frame_limit: int = 256 * 2**20  # bytes of one frame
    unfinished_limit: int = 512 * 2**20  # bytes of frames that came in part, of all peers; of one of them `frame_limit`. See `bound`
    newcomers_limit: int = 32 * 2**20  # of them, of all peers together that have shown nothing yet; larger frames come one at a time
    large_slowest: int = 2**20  # bytes a second of such a larger frame
    queue: int = 1024  # frames waiting to be sent to one peer
    queue_limit: int = 256 * 2**20  # bytes of them; of a peer that has shown nothing yet, `newcomers_limit`
    queues_limit: int = 2**30  # bytes waiting to be sent to all peers. See `bound`
    frames_per_second: float = 10_000.0  # of one peer; one that sends more is read more slowly
    peers: int = 1024  # connected at once
    dials: int = 128  # under way at once
    strangers: int = 128  # streams at once that have not proved the secret yet
    streams_per_peer: int = 4  # that one peer may open at once; it needs one


@dataclass(slots=True, eq=False)
class Connection:
    """What waits for one peer, and the tasks that carry it."""

    rate: Rate
    outbox: asyncio.Queue[tuple[list[bytes | memoryview], int]]  # frames and their bytes
    waiting: int = 0  # bytes in the outbox
    writer: asyncio.StreamWriter | None = None  # of the stream, once the peer has proved itself
    dialled: bool = False  # and not connected yet
    shown: bool = False  # the peer has done what costs it something: it sent a large frame whole, or it is announced
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Connections:
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
        self._open: dict[str, Connection] = {}
        self._rates: dict[str, Rate] = {}  # of those connected last, so that a new connection is no new start

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._open.values())

    def __contains__(self, peer: str) -> bool:
        return peer in self._open

    def get(self, peer: str) -> Connection | None:
        return self._open.get(peer)

    def clear(self) -> None:
        """Forget all of them; nobody is told."""
        self._open.clear()
        self.waiting = 0

    def open(self, peer: str) -> Connection:
        """A connection to a peer that has none."""
        rate = self._rates.pop(peer, None) or Rate(self._config.frames_per_second)
        self._rates[peer] = rate
        if len(self._rates) > 2 * self._config.peers:
            del self._rates[next(iter(self._rates))]
        connection = self._open[peer] = Connection(rate, asyncio.Queue(self._config.queue))
        return connection

    def start(self, connection: Connection, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the connection."""
        task = self._loop.create_task(work)
        connection.tasks.add(task)
        task.add_done_callback(connection.tasks.discard)
        return task

    def hold(self, connection: Connection, size: int) -> None:
        """Count `size` more bytes in a connection's outbox, or fewer. Where all outboxes hold too much, the fullest connection ends."""
        connection.waiting += size
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
        connection = self._open.get(peer)
        if connection is not None:
            self.lose(peer, connection, reason)

    def lose(self, peer: str, connection: Connection, reason: str) -> None:
        """End a connection and its tasks, and tell of it."""
        if self._open.get(peer) is not connection:
            return  # already lost, or replaced
        del self._open[peer]
        self.waiting -= connection.waiting
        connection.waiting = 0
        log.info("peer %s is lost: %s", peer, reason, extra={"peer": peer})
        current = asyncio.current_task(self._loop)
        for task in connection.tasks:
            if task is not current:
                task.cancel()
        self.tell_lost(peer)

    def tell_lost(self, peer: str) -> None:
        """The peer cannot be reached, or no longer."""
        if self.on_lost is not None and not self.closed:
            with barrier("the loss of a peer"):
                self.on_lost(peer)


OnStream = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class StreamAcceptor:
    """On the network's event loop.

    Args:
        shake_hands: as the listener. Raises `Unauthorized`, and what reading and writing raise.
        carry: what a peer that has proved itself sends and gets, until its stream ends.
    """

    def __init__(self, config: P2PConfig, connections: Connections, *, shake_hands: OnStream, carry: OnStream) -> None:
        self._config, self._connections, self._shake_hands, self._carry = config, connections, shake_hands, carry
        self._streams: Counter[str] = Counter()  # that each peer has opened
        self._serving: set[asyncio.Task[None]] = set()  # those streams
        self.strangers = 0  # streams that have not proved the secret yet

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Of the streams that are open."""
        return list(self._serving)

    async def accept(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Whatever a peer opens. The work is done in a task of its own, which may be cancelled."""
        peer = info.peer_id.to_base58()
        refusal = self._no_stream(peer)
        if refusal is not None:
            self._connections.counts["refused"] += 1
            log.debug("a stream of peer %s was refused: %s", peer, refusal, extra={"peer": peer})
            writer.close()
            return
        self._streams[peer] += 1
        serving = asyncio.create_task(self._serve(peer, reader, writer))
        self._serving.add(serving)
        try:
            await asyncio.wait([serving])
        finally:
            self._serving.discard(serving)
            writer.close()
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with barrier("a stream that a peer opened"):
            admitted = await self._admit(peer, reader, writer)
            if admitted and not self._connections.bans.seconds_left(peer):  # for what it did on another stream meanwhile
                await self._carry(peer, reader, writer)

    def _no_stream(self, peer: str) -> str | None:
        """Why `peer` may not open a stream now, if it may not."""
        if self._connections.bans.seconds_left(peer):
            return f"it is banned for another {self._connections.bans.seconds_left(peer):.0f} s"
        if self._streams[peer] >= self._config.streams_per_peer:
            return f"it has {self._streams[peer]} already"
        if self.strangers >= self._config.strangers:
            return f"{self.strangers} others are shaking hands already"
        if peer not in self._connections and len(self._connections) >= self._config.peers:
            return f"{self._config.peers} peers are connected already"
        return None

    async def _admit(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the dialer proves that it knows the secret."""
        self.strangers += 1
        try:
            async with asyncio.timeout(self._config.handshake_timeout):
                await self._shake_hands(peer, reader, writer)
            return True
        except (Unauthorized, TimeoutError) as error:
            self._connections.ban(peer, str(error) or f"it did not finish the handshake within {self._config.handshake_timeout:g} s")
        except (OSError, EOFError) as error:
            log.info("peer %s gave up the handshake: %r", peer, error, extra={"peer": peer})
        finally:
            self.strangers -= 1
        return False


_TURN = 16  # frames of one peer, until the others get their turn
_SHOWN = 2**20  # bytes: who sent a frame of so many whole is no newcomer
_SMALL = 8 * 2**10  # bytes of a frame for which there is always room


class FrameReader:
    """Hands each frame of a peer to `handle`, on the network's event loop.

    A peer that has shown nothing yet is a newcomer, and all newcomers share `newcomers_limit`. A frame that is larger than its peer
    may have room for waits until no other such frame comes, and then has to come quickly. `known` tells who is announced, and so no
    newcomer.
    """

    def __init__(
        self, config: P2PConfig, connections: Connections, handle: Callable[[str, memoryview], None], *, known: Callable[[str], bool]
    ) -> None:
        self._config, self._connections, self._handle, self._known = config, connections, handle, known
        self._unfinished = Room(each=min(config.frame_limit, config.unfinished_limit), total=config.unfinished_limit)
        self._newcomers = Room(each=config.newcomers_limit, total=config.newcomers_limit)
        self._large = asyncio.Lock()  # held by the peer that sends more than it may have room for
        self._large_held = Room(each=config.frame_limit, total=config.frame_limit)

    @property
    def unfinished(self) -> int:
        """Bytes held now of frames that came in part."""
        return self._unfinished.held + self._large_held.held

    def bound(self, size: int) -> None:
        """All frames that came in part take `size` bytes at most from here on, those of one peer half of it; one larger frame at a time
        comes beside them."""
        self._unfinished.resize(each=min(self._config.frame_limit, size // 2), total=size)

    async def read(self, peer: str, connection: Connection, reader: asyncio.StreamReader) -> None:
        """Handle a peer's frames until the stream ends; the peer is lost then, or banned."""
        reason = "its message could not be handled"
        handled = 0
        try:
            while (length := await frames.read_length(reader, self._config.frame_limit)) is not None:
                self._handle(peer, await self._body(peer, connection, reader, length))
                handled += 1
                pause = connection.rate.take()
                if pause:
                    self._connections.counts["slowed"] += 1
                if pause or handled % _TURN == 0:
                    await asyncio.sleep(pause)
            reason = "it closed the stream"
        except ProtocolError as error:
            self._connections.ban(peer, str(error))
        except TimeoutError:
            self._connections.ban(peer, "the rest of a frame did not come")
        except (CorollaError, OSError, EOFError) as error:
            reason = f"reading failed: {error}"
        finally:
            self._connections.lose(peer, connection, reason)

    async def _body(self, peer: str, connection: Connection, reader: asyncio.StreamReader, length: int) -> memoryview:
        connection.shown = connection.shown or self._known(peer)
        rooms = (self._unfinished,) if connection.shown or length <= _SMALL else (self._unfinished, self._newcomers)
        if length <= min(room.each for room in rooms):
            body = await self._within(peer, reader, length, self._config.slowest, *rooms)
        else:
            slowest = max(self._config.slowest, self._config.large_slowest)
            async with self._large:
                body = await self._within(peer, reader, length, slowest, self._large_held)
        connection.shown = connection.shown or length >= _SHOWN
        return body

    async def _within(self, peer: str, reader: asyncio.StreamReader, length: int, slowest: int, *rooms: Room) -> memoryview:
        """The frame, at so many bytes a second at least, held in all of the rooms meanwhile."""
        held = [0 for _ in rooms]

        def hold(count: int) -> None:
            for number, room in enumerate(rooms):
                room.take(peer, count)
                held[number] += count

        try:
            async with asyncio.timeout(self._config.frame_timeout + length / slowest):
                return await frames.read_body(reader, length, hold)
        finally:
            for room, count in zip(rooms, held, strict=True):
                room.give(peer, count)
