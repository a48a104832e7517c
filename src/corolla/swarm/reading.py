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
_SHOWN = 2**20  # bytes: who sent a frame of so many whole is no newcomer
_SMALL = 8 * 2**10  # bytes of a frame for which there is always room


class Reading:
    """Hands each frame of a peer to `handle`, on the network's event loop.

    A peer that has shown nothing yet is a newcomer, and all newcomers share `newcomers_limit`. A frame that is larger than its peer
    may have room for waits until no other such frame comes, and then has to come quickly. `known` tells who is announced, and so no
    newcomer.
    """

    def __init__(
        self, config: P2PConfig, channels: Channels, handle: Callable[[str, memoryview], None], *, known: Callable[[str], bool]
    ) -> None:
        self._config, self._channels, self._handle, self._known = config, channels, handle, known
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

    async def read(self, peer: str, channel: Channel, reader: asyncio.StreamReader) -> None:
        """Handle a peer's frames until the stream ends; the peer is lost then, or banned."""
        reason = "its message could not be handled"
        handled = 0
        try:
            while (length := await frames.read_length(reader, self._config.frame_limit)) is not None:
                self._handle(peer, await self._body(peer, channel, reader, length))
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

    async def _body(self, peer: str, channel: Channel, reader: asyncio.StreamReader, length: int) -> memoryview:
        channel.shown = channel.shown or self._known(peer)
        rooms = (self._unfinished,) if channel.shown or length <= _SMALL else (self._unfinished, self._newcomers)
        if length <= min(room.each for room in rooms):
            body = await self._within(peer, reader, length, self._config.slowest, *rooms)
        else:
            slowest = max(self._config.slowest, self._config.large_slowest)
            async with self._large:
                body = await self._within(peer, reader, length, slowest, self._large_held)
        channel.shown = channel.shown or length >= _SHOWN
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
