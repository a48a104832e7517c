"""Streams that peers open: how many of them, by whom, and who may go on after the handshake."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from corolla.barrier import barrier
from corolla.errors import Unauthorized
from corolla.swarm.channels import Channels
from corolla.swarm.limits import Sparing

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

    from corolla.swarm.p2p import P2PConfig

log = logging.getLogger(__name__)
log.addFilter(Sparing())
OnStream = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Accepting:
    """On the network's event loop.

    Args:
        shake_hands: as the listener. Raises `Unauthorized`, and what reading and writing raise.
        carry: what a peer that has proved itself sends and gets, until its stream ends.
    """

    def __init__(self, config: P2PConfig, channels: Channels, *, shake_hands: OnStream, carry: OnStream) -> None:
        self._config, self._channels, self._shake_hands, self._carry = config, channels, shake_hands, carry
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
            self._channels.counts["refused"] += 1
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
            if admitted and not self._channels.bans.left(peer):  # for what it did on another stream meanwhile
                await self._carry(peer, reader, writer)

    def _no_stream(self, peer: str) -> str | None:
        """Why `peer` may not open a stream now, if it may not."""
        if self._channels.bans.left(peer):
            return f"it is banned for another {self._channels.bans.left(peer):.0f} s"
        if self._streams[peer] >= self._config.streams_per_peer:
            return f"it has {self._streams[peer]} already"
        if self.strangers >= self._config.strangers:
            return f"{self.strangers} others are shaking hands already"
        if peer not in self._channels and len(self._channels) >= self._config.peers:
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
            self._channels.ban(peer, str(error) or f"it did not finish the handshake within {self._config.handshake_timeout:g} s")
        except (OSError, EOFError) as error:
            log.info("peer %s gave up the handshake: %r", peer, error, extra={"peer": peer})
        finally:
            self.strangers -= 1
        return False
