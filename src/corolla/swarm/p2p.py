"""Peers over hivemind's libp2p: one long-lived binary stream for each pair, our frames on it.

A stream of bytes and no unary calls: measured on loopback, 0.21 ms a round trip for 2.3 KB against 0.57, and 3.4 ms for 1 MB
against 11. Both sides prove the swarm's secret before the first frame. Everything runs on one event loop in a thread of its own.

A peer that breaks the protocol is banned for a growing time: its streams are closed and refused, and nothing is sent to it. What
happens to honest peers too (a cut in the middle of a frame, a handshake that is given up) bans nobody: this side's deadlines
are longer than those after which an honest peer gives up by itself.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from corolla.barrier import barrier
from corolla.errors import CallerError, CorollaError, DeadlineExceeded, NetworkError, Unauthorized
from corolla.messages import Refused, Unknown, WireMessage
from corolla.swarm import frames
from corolla.swarm.bans import Bans
from corolla.swarm.connection import Connection, Connections, FrameReader, P2PConfig, StreamAcceptor
from corolla.swarm.dialling import connect, open_stream
from corolla.swarm.handshake import Handshake, Role
from corolla.swarm.limits import Sparing
from corolla.swarm.network import OnLost, OnMessage

if TYPE_CHECKING:
    from hivemind import DHT
    from hivemind.p2p import P2P

PROTOCOL = "/corolla/frames/1"
T = TypeVar("T")
_START_TIMEOUT = 30.0  # seconds for the daemon's connection at first
_ONE_WRITE = 256 * 2**10  # bytes: frames that wait together go out together
_KNOWN = 4096  # peers whose addresses are remembered
log = logging.getLogger(__name__)
log.addFilter(Sparing())


class P2PNetwork:
    """A `Network` over the libp2p daemon of a hivemind DHT node, whose peer id is this peer's.

    `bans` are of peers that broke the protocol. Raises `DeadlineExceeded` when the daemon does not answer.
    """

    def __init__(self, dht: DHT, config: P2PConfig | None = None, *, bans: Bans | None = None) -> None:
        self._config = config = config or P2PConfig()
        self.bans = bans or Bans()
        self._me = dht.peer_id.to_base58()
        self._on_message: OnMessage | None = None
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._kept: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._connections = Connections(config, self._loop, self.bans)
        self._frame_reader = FrameReader(config, self._connections, self._handle, known=lambda peer: peer in self._addresses)
        self._acceptor = StreamAcceptor(config, self._connections, shake_hands=self._listen_to, carry=self._carry)
        self._thread = threading.Thread(target=self._loop.run_forever, name="corolla-p2p", daemon=True)
        self._thread.start()
        self._p2p: P2P = self.run(dht.replicate_p2p(), _START_TIMEOUT)

    @property
    def me(self) -> str:
        return self._me

    @property
    def counts(self) -> Mapping[str, int]:
        """How often peers were `banned`, their streams `refused`, and the reading from them `slowed`, since the start."""
        return {name: self._connections.counts[name] for name in ("banned", "refused", "slowed")}

    @property
    def peers(self) -> int:
        """How many are connected, or being dialled."""
        return len(self._connections)

    @property
    def strangers(self) -> int:
        """How many streams have not proved the secret yet."""
        return self._acceptor.strangers

    @property
    def unfinished(self) -> int:
        """Bytes held now of frames that came in part."""
        return self._frame_reader.unfinished

    @property
    def waiting(self) -> int:
        """Bytes held now of frames that wait to be sent."""
        return self._connections.waiting

    @property
    def failure(self) -> str | None:
        """Why nothing goes out or comes in any more, if so, in words; for any thread. A network that was closed has not failed."""
        if self._connections.closed:
            return None
        if not self._thread.is_alive():
            return "the network's thread has ended"
        reading, listening = self._p2p._client.control._read_task, self._p2p._listen_task
        if any(task is not None and task.done() for task in (reading, listening)):
            return "the connection to this machine's libp2p daemon broke"
        return None

    def know(self, addresses: Mapping[str, Sequence[str]]) -> None:
        """Where peers say that they listen (multiaddrs), for when they are dialled. For any thread.

        libp2p's own way of finding a peer leaves out addresses that it takes for unreachable, and asks others first.
        """
        older = {peer: known for peer, known in self._addresses.items() if peer not in addresses}
        newer = {peer: tuple(given) for peer, given in addresses.items()}
        self._addresses = dict(list((older | newer).items())[-_KNOWN:])

    def bound(self, size: int) -> None:
        """Frames that came in part, and frames that wait to be sent, take `size` bytes at most from here on: a third and two thirds of
        it. One frame at a time may be larger, of each kind. For any thread."""
        self._frame_reader.bound(size // 3)
        self._connections.queues_limit = size // 3 * 2

    def listen(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """See `Network.listen`."""
        listening = self._on_message is not None
        self._on_message, self._connections.on_lost = on_message, on_lost
        if not listening:
            self.run(self._p2p.add_binary_stream_handler(PROTOCOL, self._acceptor.accept), _START_TIMEOUT)

    def send(self, peer: str, message: WireMessage) -> None:
        """See `Network.send`; also raises `CallerError` for a message that no frame holds."""
        self._hand_over([(peer, *self._encode(message))])

    def send_all(self, messages: Sequence[tuple[str, WireMessage]]) -> None:
        """See `Network.send_all`; also raises `CallerError` for a message that no frame holds, and sends none then."""
        self._hand_over([(peer, *self._encode(message)) for peer, message in messages])

    def _encode(self, message: WireMessage) -> tuple[list[bytes | memoryview], int]:
        """The message's buffers, and their bytes."""
        buffers = frames.encode(message)
        size = sum(len(buffer) for buffer in buffers)
        if size > self._config.frame_limit:
            raise CallerError(f"the message takes {size} bytes and peers take {self._config.frame_limit}: send fewer tokens at once")
        return buffers, size

    def _hand_over(self, encoded: list[tuple[str, list[bytes | memoryview], int]]) -> None:
        try:
            if self._connections.closed:
                raise NetworkError("this peer has left the swarm")
            self._loop.call_soon_threadsafe(self._enqueue_all, encoded)
        except RuntimeError as error:  # the loop was closed just now
            raise NetworkError("this peer has left the swarm") from error

    def run(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """Run a coroutine on this network's event loop and wait for it, from another thread. Raises `DeadlineExceeded`."""
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result(timeout)
        except TimeoutError as error:
            running.cancel()
            raise DeadlineExceeded(f"the peer-to-peer network did not answer within {timeout:g} s") from error

    def keep_running(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine on this network's event loop until it ends or the network is closed."""
        self._loop.call_soon_threadsafe(self._keep, work)

    def close(self) -> None:
        """See `Network.close`."""
        if self._connections.closed:
            return
        self._connections.closed = True
        self.run(self._leave(), _START_TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # On the loop from here on. First what goes out.

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    def _enqueue_all(self, encoded: list[tuple[str, list[bytes | memoryview], int]]) -> None:
        for peer, buffers, size in encoded:
            with barrier("sending to a peer"):
                self._enqueue(peer, buffers, size)

    def _enqueue(self, peer: str, buffers: list[bytes | memoryview], size: int) -> None:
        if peer == self._me:
            self._handle(peer, memoryview(b"".join(buffers))[frames.LENGTH.size :])
            return
        connection = self._connections.get(peer)
        if connection is None:
            refusal = self._no_dial(peer)
            if refusal is not None:
                log.info("peer %s is not dialled: %s", peer, refusal, extra={"peer": peer})
                self._connections.tell_lost(peer)
                return
            connection = self._connections.open(peer)
            connection.dialled = True
            self._connections.start(connection, self._dial(peer, connection))
        limit = self._config.queue_limit if connection.shown else self._config.newcomers_limit
        limit = min(limit, self._connections.queues_limit)
        if connection.outbox.full() or (connection.waiting and connection.waiting + size > limit):
            self._connections.lose(peer, connection, "it takes nothing any more")
            return
        if connection.writer is not None and not connection.waiting and not connection.writer.transport.get_write_buffer_size():
            connection.writer.writelines(buffers)  # nothing is before it: it need not wait for the task's turn
            return
        connection.outbox.put_nowait((buffers, size))
        self._connections.hold(connection, size)

    def _no_dial(self, peer: str) -> str | None:
        """Why `peer` may not be dialled now, if it may not."""
        if self.bans.seconds_left(peer):
            return f"it is banned for another {self.bans.seconds_left(peer):.0f} s"
        if len(self._connections) >= self._config.peers:
            return f"{self._config.peers} peers are connected already"
        if sum(connection.dialled for connection in self._connections) >= self._config.dials:
            return f"{self._config.dials} others are being dialled already"
        return None

    async def _dial(self, peer: str, connection: Connection) -> None:
        from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID

        writer = None
        try:
            with barrier("dialling a peer", lambda error: self._not_dialled(peer, connection, error)):
                try:
                    async with asyncio.timeout(self._config.dial_timeout):
                        await self._connect(peer)
                        reader, writer = await open_stream(self._p2p, PeerID.from_base58(peer), PROTOCOL)
                        await self._shake_hands(peer, reader, writer, "dialer")
                except Unauthorized as error:
                    self._connections.ban(peer, str(error))
                    return
                except (CorollaError, OSError, EOFError, TimeoutError, P2PDaemonError, P2PHandlerError, ValueError) as error:
                    self._not_dialled(peer, connection, error)
                    return
                connection.dialled = False
                if connection.writer is None:
                    self._connections.start(connection, self._write(peer, connection, writer))
                await self._frame_reader.read(peer, connection, reader)
        finally:
            connection.dialled = False
            if writer is not None:
                writer.close()

    def _not_dialled(self, peer: str, connection: Connection, error: Exception) -> None:
        """A peer that came by itself meanwhile is served on the stream that it opened."""
        if connection.writer is None:
            self._connections.lose(peer, connection, f"dialling failed: {error!r}")

    async def _connect(self, peer: str) -> None:
        """At the addresses that it announces, where they are known. Where none of them answers, libp2p may know others."""
        from hivemind.p2p import P2PDaemonError, PeerID
        from hivemind.utils.multiaddr import Multiaddr
        from hivemind.utils.multiaddr.exceptions import Error as NoMultiaddr

        parsed = []
        for address in self._addresses.get(peer, ()):
            with suppress(NoMultiaddr):
                parsed.append(Multiaddr(address.removesuffix(f"/p2p/{peer}")))
        if parsed:
            with suppress(P2PDaemonError):
                await connect(self._p2p, PeerID.from_base58(peer), parsed)

    async def _write(self, peer: str, connection: Connection, writer: asyncio.StreamWriter) -> None:
        connection.writer = writer
        with barrier("writing to a peer", lambda error: self._connections.lose(peer, connection, f"writing failed: {error!r}")):
            try:
                while True:
                    buffers, size = await connection.outbox.get()
                    while size < _ONE_WRITE and not connection.outbox.empty():
                        more, count = connection.outbox.get_nowait()
                        buffers += more
                        size += count
                    writer.writelines(buffers)
                    async with asyncio.timeout(self._config.write_timeout + size / self._config.slowest):
                        await writer.drain()
                    self._connections.hold(connection, -size)
            except (OSError, TimeoutError) as error:
                self._connections.lose(peer, connection, f"writing failed: {error!r}")

    # What comes in.

    async def _carry(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Replies go back on the stream that the peer opened: one stream for each pair. So does what waits while it is dialled:
        a peer that can dial this one may be one that cannot be dialled."""
        connection = self._connections.get(peer) or self._connections.open(peer)
        if connection.writer is None:
            connection.writer = writer
            self._connections.start(connection, self._write(peer, connection, writer))
        await self._connections.start(connection, self._frame_reader.read(peer, connection, reader))

    async def _listen_to(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._shake_hands(peer, reader, writer, "listener")

    async def _shake_hands(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, role: Role) -> None:
        async def write(message: bytes) -> None:
            writer.write(message)
            await writer.drain()

        await Handshake(self._config.secret, self._me, peer, role).run(reader.readexactly, write)

    def _handle(self, peer: str, frame: memoryview) -> None:
        message = frames.decode(frame)
        if isinstance(message, Unknown):
            buffers = frames.encode(Refused(message.kind))
            self._enqueue(peer, buffers, sum(len(buffer) for buffer in buffers))
        else:
            self._deliver(peer, message)

    def _deliver(self, peer: str, message: WireMessage) -> None:
        """What is taken wrongly ends that message; an error of the tree ends the connection, as it did not come by surprise."""
        assert self._on_message is not None, "a stream was opened before `listen`"
        expected = None
        with barrier("a message of a peer"):
            try:
                self._on_message(peer, message)
            except CorollaError as error:
                expected = error
        if expected is not None:
            raise expected

    async def _leave(self) -> None:
        tasks = [*self._kept, *self._acceptor.tasks, *(task for connection in self._connections for task in connection.tasks)]
        self._connections.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(OSError):
            await self._p2p.shutdown()
