"""A TCP proxy that makes a bad network: delay, jitter, stalls, little bandwidth, cuts and flipped bytes.

The kernel at hand may have no netem, so trouble is made above it: a server listens at one port, announces the proxy's, and
whoever dials it goes through here. Two servers reach each other through whichever of their proxies was dialled.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass

_CHUNK = 16 * 2**10  # bytes taken at once: what a stall holds or a flipped byte spoils
_QUEUED = 1024  # chunks on their way in one direction; more are left to TCP


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What the proxy does to every chunk, in each direction on its own. Times in seconds."""

    delay: float = 0.0
    jitter: float = 0.0  # up to this much more, evenly; chunks never overtake one another
    stalled: float = 0.0  # the share of chunks that are held for `stall`
    stall: float = 1.0
    bandwidth: float = float("inf")  # bytes a second
    corrupted: float = 0.0  # the share of chunks in which one byte is flipped


@dataclass(slots=True)
class Counters:
    """What went through since the proxy was made."""

    connections: int = 0
    refused: int = 0
    cuts: int = 0
    bytes_in: int = 0  # towards the target
    bytes_out: int = 0
    stalls: int = 0
    corruptions: int = 0
    chunks: int = 0  # that were passed on
    held: float = 0.0  # seconds, all of them together: an event loop's clock wakes up to a millisecond late


class ChaosProxy:
    """Passes what arrives at `port` on to `target_port`, both on this machine, from `start` to `close`.

    `weather` may be changed at any time, from any thread; chunks that are on their way keep the old one. The same `seed`
    draws the same trouble for the same chunks.
    """

    def __init__(self, target_port: int, weather: Weather | None = None, *, seed: int = 0) -> None:
        self.target_port = target_port
        self.weather = weather or Weather()
        self.counters = Counters()
        self.port = 0
        self._random = random.Random(seed)
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy", daemon=True)
        self._server: asyncio.Server | None = None

    def __enter__(self) -> ChaosProxy:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """The proxy's multiaddr, to be announced."""
        return f"/ip4/127.0.0.1/tcp/{self.port}"

    def start(self) -> None:
        """Listen at a free port, which is `port` from then on."""
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """End every connection and the thread. Closing twice is no error."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Break every connection at both ends and let nobody through until `mend`."""
        self._is_cut = True
        self.counters.cuts += 1
        self._loop.call_soon_threadsafe(self._break)

    def mend(self) -> None:
        """Let connections through again."""
        self._is_cut = False

    # On the loop from here on.

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            self.counters.refused += 1
            _reset(writer)
            return
        self._writers.add(writer)  # so that a cut finds it while the target is being dialled
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            self.counters.refused += 1
            self._writers.discard(writer)
            _reset(writer)
            return
        self.counters.connections += 1
        self._writers.add(target_writer)
        try:
            await asyncio.gather(self._pass(reader, target_writer, inward=True), self._pass(target_reader, writer, inward=False))
        finally:
            for one in (writer, target_writer):
                self._writers.discard(one)
                one.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, inward: bool) -> None:
        """One direction: chunks are read as they come and written when they are due."""
        queue: asyncio.Queue[tuple[float, float, bytes]] = asyncio.Queue(_QUEUED)
        writing = asyncio.create_task(self._write(queue, writer))
        free = due = 0.0  # when the link has sent the last chunk, and when that arrives
        try:
            while chunk := await reader.read(_CHUNK):
                if inward:
                    self.counters.bytes_in += len(chunk)
                else:
                    self.counters.bytes_out += len(chunk)
                came = time.monotonic()
                free = max(free, came) + len(chunk) / self.weather.bandwidth
                due = max(due, free + self._lateness())
                await queue.put((came, due, self._spoil(chunk)))
        except OSError:  # broken off: so is the other end
            _reset(writer)
        await queue.put((due, due, b""))
        await writing

    def _lateness(self) -> float:
        weather = self.weather
        late = weather.delay + weather.jitter * self._random.random()
        if self._random.random() < weather.stalled:
            self.counters.stalls += 1
            late += weather.stall
        return late

    def _spoil(self, chunk: bytes) -> bytes:
        if self._random.random() >= self.weather.corrupted:
            return chunk
        self.counters.corruptions += 1
        place = self._random.randrange(len(chunk))
        return chunk[:place] + bytes([chunk[place] ^ 1 << self._random.randrange(8)]) + chunk[place + 1 :]

    async def _write(self, queue: asyncio.Queue[tuple[float, float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            came, due, chunk = await queue.get()
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            try:
                if not chunk:
                    writer.write_eof()
                    return
                writer.write(chunk)
                self.counters.chunks += 1
                self.counters.held += time.monotonic() - came
                await writer.drain()
            except OSError:  # broken: what still comes is thrown away
                while chunk:
                    _, _, chunk = await queue.get()
                return

    def _break(self) -> None:
        for writer in self._writers:
            _reset(writer)

    async def _end(self) -> None:
        assert self._server is not None, "it runs, so it was started"
        self._server.close()
        self._break()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Break off at once, so that the other end sees a broken connection and not an orderly end."""
    if not writer.transport.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
