"""Frames as they come in from a peer: whole, at a bounded rate, with room for what came in part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from corolla.errors import CorollaError, ProtocolError
from corolla.swarm import frames
from corolla.swarm.channels import Channel, Channels
from corolla.swarm.limits import Room

if TYPE_CHECKING:
    from corolla.swarm.p2p import P2PConfig

_TURN = 16  # frames of one peer, until the others get their turn


class Reading:
    """Hands each frame of a peer to `handle`, on the network's event loop."""

    def __init__(self, config: P2PConfig, channels: Channels, handle: Callable[[str, memoryview], None]) -> None:
        self._config, self._channels, self._handle = config, channels, handle
        self._unfinished = Room(each=config.frame_limit, total=config.unfinished_limit)

    @property
    def unfinished(self) -> int:
        """Bytes held now of frames that came in part."""
        return self._unfinished.held

    async def read(self, peer: str, channel: Channel, reader: asyncio.StreamReader) -> None:
        """Handle a peer's frames until the stream ends; the peer is lost then, or banned."""
        reason = "its message could not be handled"
        handled = 0
        try:
            while (length := await frames.read_length(reader, self._config.frame_limit)) is not None:
                self._handle(peer, await self._body(peer, reader, length))
                handled += 1
                pause = channel.rate.take()
                if pause:
                    self._channels.counts["slowed"] += 1
                if pause or handled % _TURN == 0:
                    await asyncio.sleep(pause)
            reason = "it closed the stream"
        except ProtocolError as error:
            self._channels.ban(peer, str(error))
        except TimeoutError:
            self._channels.ban(peer, "the rest of a frame did not come")
        except (CorollaError, OSError, EOFError) as error:
            reason = f"reading failed: {error}"
        finally:
            self._channels.lose(peer, channel, reason)

    async def _body(self, peer: str, reader: asyncio.StreamReader, length: int) -> memoryview:
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            self._unfinished.take(peer, count)
            held += count

        try:
            async with asyncio.timeout(self._config.frame_timeout + length / self._config.slowest):
                return await frames.read_body(reader, length, hold)
        finally:
            self._unfinished.give(peer, held)
