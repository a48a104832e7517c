"""libp2p daemons of this process, for tests: below a `P2PNetwork`, or in the hands of somebody hostile."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from corolla.messages import Ping, Pong, WireMessage
from corolla.swarm.bans import Bans
from corolla.swarm.connection import P2PConfig
from corolla.swarm.handshake import MESSAGE_BYTES, Handshake
from corolla.swarm.p2p import PROTOCOL, P2PNetwork

# hivemind scripts a function as it is imported, which torch 2.13 calls deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from hivemind.p2p import P2P, PeerID

PATIENCE = 60.0  # seconds for anything that should happen, on a loaded machine


class Daemon:
    """What `P2PNetwork` needs of a DHT node, without the DHT: a peer id and a daemon, which takes seconds less to start."""

    def __init__(self, identity: Path, peers: Sequence[str] = ()) -> None:
        P2P.generate_identity(str(identity))
        self._identity, self._peers = identity, peers
        self.peer_id = PeerID.from_identity(identity.read_bytes())
        self.addresses: list[str] = []

    async def replicate_p2p(self) -> P2P:
        """Start it on the running loop; whoever shuts the result down ends it."""
        p2p = await P2P.create(initial_peers=self._peers, identity_path=str(self._identity), check_if_identity_free=False)
        self.addresses = [str(address) for address in await p2p.get_visible_maddrs()]
        return p2p


class Peer:
    """An honest peer: it answers pings, and remembers what came and who was lost."""

    def __init__(
        self, identity: Path, config: P2PConfig, *, peers: Sequence[str] = (), bans: Bans | None = None, listens: bool = True
    ) -> None:
        daemon = Daemon(identity, peers)
        self.network = P2PNetwork(daemon, config, bans=bans)
        self.addresses = daemon.addresses
        self.me = self.network.me
        self.came: list[tuple[str, WireMessage]] = []
        self.lost: list[str] = []
        self._changed = threading.Condition()
        if listens:
            self.network.listen(self._receive, self._lose)

    def ping(self, peer: str, nonce: int) -> None:
        """Ask `peer` and wait for its answer."""
        self.network.send(peer, Ping(nonce))
        self.wait(lambda: (peer, Pong(nonce)) in self.came)

    def wait(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(happened, PATIENCE)

    def _receive(self, sender: str, message: WireMessage) -> None:
        if isinstance(message, Ping):
            self.network.send(sender, Pong(message.nonce))
        with self._changed:
            self.came.append((sender, message))
            self._changed.notify_all()

    def _lose(self, peer: str) -> None:
        with self._changed:
            self.lost.append(peer)
            self._changed.notify_all()


class Stream:
    """A stream to a peer, on which anything may be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.heard: list[bytes] = []
        self.said: list[bytes] = []

    async def read(self, count: int) -> bytes:
        data = await self._reader.readexactly(count)
        self.heard.append(data)
        return data

    async def write(self, data: bytes) -> None:
        self.said.append(data)
        self._writer.write(data)
        await self._writer.drain()

    async def until_closed(self) -> None:
        """Return when the peer has closed the stream."""
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionError):
                while await self._reader.read(2**16):
                    pass

    async def close(self) -> None:
        """At once: what was said and did not go out yet never will."""
        self._writer.transport.abort()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


class Hostile:
    """A peer of its own key that does as it likes: `async with Hostile(...)`."""

    def __init__(self, identity: Path, target: str, addresses: Sequence[str], secret: bytes | None) -> None:
        self._daemon = Daemon(identity, addresses)
        self._target, self._secret = target, secret
        self._streams: list[Stream] = []
        self.me = self._daemon.peer_id.to_base58()

    async def __aenter__(self) -> Hostile:
        self._p2p = await self._daemon.replicate_p2p()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self.leave()
        await self._p2p.shutdown()

    async def leave(self) -> None:
        """Close all streams."""
        for stream in self._streams:
            await stream.close()

    async def open(self) -> Stream:
        """A stream to the target, and nothing said yet."""
        async with asyncio.timeout(PATIENCE):
            _, reader, writer = await self._p2p.call_binary_stream_handler(PeerID.from_base58(self._target), PROTOCOL)
        self._streams.append(Stream(reader, writer))
        return self._streams[-1]

    async def enter(self) -> Stream:
        """A stream after an honest handshake."""
        stream = await self.open()
        async with asyncio.timeout(PATIENCE):
            await Handshake(self._secret, self.me, self._target, "dialer").run(stream.read, stream.write)
        return stream

    async def refused(self) -> bool:
        """Whether the target closes a stream before it says anything; a peer that may enter is answered its hello."""
        stream = await self.open()
        hello = Handshake(self._secret, self.me, self._target, "dialer").hello()
        try:
            async with asyncio.timeout(PATIENCE):
                await stream.write(hello)
                return len(await stream.read(MESSAGE_BYTES)) != MESSAGE_BYTES
        except (asyncio.IncompleteReadError, ConnectionError):
            return True
