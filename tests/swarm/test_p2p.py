"""Peers over real libp2p daemons: what honest ones do, and what hostile ones cannot."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import msgspec
import psutil
import pytest

from corolla.barrier import unexpected
from corolla.errors import CallerError, NetworkError
from corolla.messages import Array, HiddenFrame, Ping, Pong, Refused, WireMessage
from corolla.swarm import frames
from corolla.swarm.bans import BanPolicy, Bans
from corolla.swarm.connection import P2PConfig
from corolla.swarm.handshake import MESSAGE_BYTES
from tests.swarm.daemons import PATIENCE, Hostile, Peer
from tests.swarm.harness import OVER_HIVEMIND

SECRET = b"correct horse battery staple"
MEBIBYTE = 2**20
# Deadlines that a test can wait for. The peers' own are longer than those that honest peers keep to.
QUICK = P2PConfig(secret=SECRET, handshake_timeout=3.0, frame_timeout=3.0, slowest=2**30, frames_per_second=2000.0)

pytestmark = OVER_HIVEMIND


class Clock:
    """Stands still, and with it every ban."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    bans = Bans(CLOCK, BanPolicy(shortest=2.0, longest=100.0))
    peer = Peer(tmp_path_factory.mktemp("target") / "key", QUICK, bans=bans)
    yield peer
    peer.network.close()


@pytest.fixture(scope="module")
def honest(target: Peer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    peer = Peer(tmp_path_factory.mktemp("honest") / "key", P2PConfig(secret=SECRET), peers=target.addresses)
    yield peer
    peer.network.close()


def bytes_of(message: WireMessage) -> bytes:
    return b"".join(frames.encode(message))


def framed(header: bytes, body: bytes = b"", major: int = frames.MAJOR) -> bytes:
    return struct.pack("<IBBH", 4 + len(header) + len(body), major, 0, len(header)) + header + body


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not happened():
            await asyncio.sleep(0.01)


def test_two_peers_talk_on_one_stream(target: Peer, honest: Peer) -> None:
    honest.ping(target.me, 1)
    target.ping(honest.me, 2)
    for size in (1, 2000, 300_000):
        hidden = Array("float32", (1, size), memoryview(bytes(4 * size)))
        honest.network.send(target.me, HiddenFrame("s", 0, 0, hidden))
    honest.ping(target.me, 3)
    sizes = [message.hidden.data.nbytes for sender, message in target.came if isinstance(message, HiddenFrame)]
    assert sizes == [4, 8000, 1_200_000]
    for peer in (target, honest):
        assert not peer.lost
        assert not any(peer.network.counts.values())


def test_a_peer_is_dialled_where_it_says_that_it_listens(tmp_path: Path) -> None:
    """As one whose address libp2p tells nobody; these two have never heard of each other."""
    there, here = (Peer(tmp_path / name, P2PConfig(secret=SECRET)) for name in ("there", "here"))
    try:
        here.network.send(there.me, Ping(1))
        here.wait(lambda: here.lost == [there.me])
        here.network.know({there.me: ["no address", "/ip4/127.0.0.1/tcp/1", *there.addresses]})
        here.ping(there.me, 2)
    finally:
        for peer in (there, here):
            peer.network.close()


def test_a_peer_that_comes_in_while_it_is_dialled_is_served_at_once(tmp_path: Path) -> None:
    """It cannot be dialled itself, as behind a router: its address swallows connections."""
    patient = P2PConfig(dial_timeout=2 * PATIENCE)
    with socket.create_server(("127.0.0.1", 0)) as hole:
        here, there = (Peer(tmp_path / name, patient) for name in ("here", "there"))
        try:
            here.network.know({there.me: [f"/ip4/127.0.0.1/tcp/{hole.getsockname()[1]}"]})
            there.network.know({here.me: here.addresses})
            here.network.send(there.me, Ping(1))
            there.ping(here.me, 2)
            here.wait(lambda: (there.me, Pong(1)) in here.came)
            assert not here.lost
            assert not there.lost
        finally:
            for peer in (here, there):
                peer.network.close()


def test_a_handler_that_fails_ends_that_message_alone(tmp_path: Path) -> None:
    target = Peer(tmp_path / "target", P2PConfig(), listens=False)
    honest = Peer(tmp_path / "honest", P2PConfig(), peers=target.addresses)

    def receive(sender: str, message: WireMessage) -> None:
        assert isinstance(message, Ping)
        if message.nonce % 2:
            raise (KeyError, RuntimeError, MemoryError)[message.nonce % 3](message.nonce)
        target.network.send(sender, Pong(message.nonce))

    def lose(peer: str) -> None:
        raise IndexError(peer)

    target.network.listen(receive, lose)
    try:
        before = sum(unexpected.values())
        target.network.send("QmNobody", Ping(1))
        for nonce in (1, 3, 5):
            honest.network.send(target.me, Ping(nonce))
        honest.ping(target.me, 6)
        assert target.network.failure is None
        assert not honest.lost
        assert sum(unexpected.values()) == before + 4
    finally:
        for peer in (honest, target):
            peer.network.close()


HIDDEN = {"t": "hidden", "s": "s", "g": 0, "b": 0, "h": {"d": "float32", "z": [2, 2]}}
BAD_BYTES = {
    "a claimed 4 GiB": b"\xff\xff\xff\xff",
    "noise": bytes(range(255, -1, -1)) * 20,
    "a frame of nothing": struct.pack("<I", 0),
    "another version": framed(b"\x80", major=9),
    "no header": framed(b""),
    "a tensor cut short": framed(msgspec.msgpack.encode(HIDDEN), b"1234"),
    "a negative nonce": framed(msgspec.msgpack.encode({"t": "ping", "nonce": -1})),
}


@pytest.mark.parametrize("bad", BAD_BYTES.values(), ids=BAD_BYTES.keys())
def test_bytes_that_are_no_frame_ban_their_sender(
    target: Peer, honest: Peer, tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: bytes
) -> None:
    async def attack() -> str:
        async with Hostile(tmp_path / "key", target.me, target.addresses, SECRET) as hostile:
            stream, other = await hostile.enter(), await hostile.enter()
            await stream.write(bad)
            await stream.until_closed()
            await other.until_closed()
            assert await hostile.refused()
            return hostile.me

    with caplog.at_level(logging.WARNING):
        hostile = asyncio.run(attack())
    assert hostile in target.lost
    assert target.network.bans.seconds_left(hostile)
    assert [getattr(entry, "peer", None) for entry in caplog.records if entry.name == "corolla.swarm.connection"] == [hostile]
    honest.ping(target.me, 10)


def test_bans_end_and_grow(target: Peer, tmp_path: Path) -> None:
    async def attack() -> list[float]:
        bans = []
        async with Hostile(tmp_path / "key", target.me, target.addresses, SECRET) as hostile:
            for _ in range(3):
                stream = await hostile.enter()
                await stream.write(bytes(100))
                await stream.until_closed()
                assert await hostile.refused()
                bans.append(target.network.bans.seconds_left(hostile.me))
                CLOCK.now += bans[-1]
            assert not await hostile.refused()
        return bans

    assert asyncio.run(attack()) == [2.0, 4.0, 8.0]


def test_nothing_is_sent_to_a_banned_peer(target: Peer) -> None:
    target.network.bans.blame("QmNobody")
    target.network.send("QmNobody", Ping(1))
    target.wait(lambda: "QmNobody" in target.lost)


async def _says_nothing(hostile: Hostile) -> None:
    await (await hostile.open()).until_closed()


async def _says_noise(hostile: Hostile) -> None:
    stream = await hostile.open()
    await stream.write(bytes(MESSAGE_BYTES))
    await stream.until_closed()


async def _stalls_in_a_frame(hostile: Hostile) -> None:
    stream = await hostile.enter()
    await stream.write(bytes_of(Ping(5))[:-1])
    await stream.until_closed()


@pytest.mark.parametrize("attack", [_says_nothing, _says_noise, _stalls_in_a_frame])
def test_who_stalls_or_breaks_the_handshake_is_banned(target: Peer, tmp_path: Path, attack: Callable[[Hostile], object]) -> None:
    async def scenario() -> None:
        async with Hostile(tmp_path / "key", target.me, target.addresses, SECRET) as hostile:
            await attack(hostile)  # type: ignore[misc]
            assert await hostile.refused()

    asyncio.run(scenario())


def test_a_stream_cut_within_a_frame_bans_nobody(target: Peer, tmp_path: Path) -> None:
    """It is what a peer that dies looks like."""

    async def scenario() -> None:
        async with Hostile(tmp_path / "key", target.me, target.addresses, SECRET) as dying:
            stream = await dying.enter()
            await stream.write(bytes_of(Ping(5))[:-1])
            await stream.close()
            await asyncio.to_thread(target.wait, lambda: dying.me in target.lost)
            assert not await dying.refused()

    asyncio.run(scenario())


def test_a_kind_of_a_later_version_bans_nobody(target: Peer, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Hostile(tmp_path / "key", target.me, target.addresses, SECRET) as later:
            stream = await later.enter()
            await stream.write(framed(msgspec.msgpack.encode({"t": "later"})) + bytes_of(Ping(5)))
            for expected in (Refused("later"), Pong(5)):
                assert await stream.read(len(bytes_of(expected))) == bytes_of(expected)
            assert not await later.refused()

    asyncio.run(scenario())


@pytest.mark.parametrize("secret", [b"guessed", None])
def test_a_wrong_secret_is_refused_and_logged(target: Peer, tmp_path: Path, caplog: pytest.LogCaptureFixture, secret: bytes | None) -> None:
    stranger = Peer(tmp_path / "key", P2PConfig(secret=secret), peers=target.addresses)
    with caplog.at_level(logging.WARNING):
        stranger.network.send(target.me, Ping(1))
        stranger.wait(lambda: stranger.lost == [target.me])
    stranger.network.close()
    assert not any(sender == stranger.me for sender, _ in target.came)
    assert any(getattr(entry, "peer", None) == stranger.me and "secret" in entry.getMessage() for entry in caplog.records)


def test_a_recorded_handshake_is_refused_and_logged(target: Peer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The messages as the dialer sent them, from the same peer to the same peer."""

    async def scenario() -> str:
        async with Hostile(tmp_path / "key", target.me, target.addresses, SECRET) as hostile:
            recorded = await hostile.enter()
            await recorded.write(bytes_of(Ping(7)))
            assert await recorded.read(len(bytes_of(Pong(7)))) == bytes_of(Pong(7))
            again = await hostile.open()
            for message in recorded.said:
                await again.write(message)
            await again.until_closed()
            assert await hostile.refused()
            return hostile.me

    with caplog.at_level(logging.WARNING):
        hostile = asyncio.run(scenario())
    assert [message for sender, message in target.came if sender == hostile] == [Ping(7)]
    assert any(getattr(entry, "peer", None) == hostile and "does not know" in entry.getMessage() for entry in caplog.records)


def test_claims_allocate_nothing(target: Peer, tmp_path: Path) -> None:
    limit = QUICK.frame_limit

    async def scenario() -> int:
        async with Hostile(tmp_path / "key", target.me, target.addresses, SECRET) as hostile:
            before = psutil.Process().memory_info().rss
            streams = [await hostile.enter() for _ in range(QUICK.streams_per_peer)]
            assert await hostile.refused()  # one stream more
            for stream in streams:
                await stream.write(struct.pack("<I", limit) + bytes(1000))
            grown = 0
            while not target.network.bans.seconds_left(hostile.me):
                grown = max(grown, psutil.Process().memory_info().rss - before)
                await asyncio.sleep(0.05)
            return grown

    assert asyncio.run(scenario()) < 32 * MEBIBYTE
    assert target.network.unfinished == 0


def test_a_flood_is_read_slowly_and_the_others_are_served(target: Peer, honest: Peer, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Hostile(tmp_path / "key", target.me, target.addresses, SECRET) as hostile:
            stream = await hostile.enter()
            flood = asyncio.create_task(stream.write(bytes_of(Pong(1)) * 200_000))
            while not target.network.counts["slowed"]:
                await asyncio.sleep(0.01)
            for nonce in range(20, 40):
                await asyncio.to_thread(honest.ping, target.me, nonce)
            assert not flood.done()
            assert not target.network.bans.seconds_left(hostile.me)
            flood.cancel()

    before = psutil.Process().memory_info().rss
    asyncio.run(scenario())
    assert psutil.Process().memory_info().rss - before < 64 * MEBIBYTE
    target.came.clear()


def test_peers_and_strangers_are_bounded_in_all(tmp_path: Path) -> None:
    target = Peer(tmp_path / "key", P2PConfig(peers=2, strangers=2, dials=1))
    hostiles = [Hostile(tmp_path / f"{number}", target.me, target.addresses, None) for number in range(3)]

    async def scenario() -> None:
        async with hostiles[0] as one, hostiles[1] as two, hostiles[2] as three:
            for silent in (one, two):
                await silent.open()
            await until(lambda: target.network.strangers == 2)
            assert await three.refused()
            for silent in (one, two):
                await silent.leave()
            await until(lambda: target.network.strangers == 0)
            for peer in (one, two):
                await peer.enter()
            await until(lambda: target.network.peers == 2)
            assert await three.refused()

    asyncio.run(scenario())
    target.wait(lambda: len(target.lost) == 2)
    for nobody in ("QmNobody", "QmNobodyElse"):
        target.network.send(nobody, Ping(1))
    target.wait(lambda: {"QmNobody", "QmNobodyElse"} <= set(target.lost))
    target.network.close()


def test_who_takes_nothing_is_lost(tmp_path: Path) -> None:
    target = Peer(tmp_path / "key", P2PConfig(queue_limit=4 * MEBIBYTE))
    message = HiddenFrame("s", 0, 0, Array("float32", (256, 1024), memoryview(bytes(MEBIBYTE))))

    async def scenario() -> None:
        async with Hostile(tmp_path / "hostile", target.me, target.addresses, None) as hostile:
            await hostile.enter()
            await until(lambda: target.network.peers == 1)
            before, sent = psutil.Process().memory_info().rss, 0
            while not target.lost:
                target.network.send(hostile.me, message)
                sent += 1
                await asyncio.sleep(0.001)
            # It is read by our own daemons and streams up to their limits, and no further.
            assert sent < 200
            assert psutil.Process().memory_info().rss - before < 64 * MEBIBYTE

    asyncio.run(scenario())
    target.network.close()


def test_newcomers_hold_little_together_and_whoever_sent_a_large_frame_is_none(tmp_path: Path) -> None:
    config = P2PConfig(newcomers_limit=2 * MEBIBYTE, frame_limit=64 * MEBIBYTE)
    target = Peer(tmp_path / "key", config)
    frame = bytes_of(HiddenFrame("s", 0, 0, Array("float32", (256, 1024), memoryview(bytes(MEBIBYTE)))))
    large = bytes_of(HiddenFrame("s", 0, 1, Array("float32", (4096, 1024), memoryview(bytes(16 * MEBIBYTE)))))

    async def scenario() -> None:
        async with (
            Hostile(tmp_path / "one", target.me, target.addresses, None) as one,
            Hostile(tmp_path / "two", target.me, target.addresses, None) as two,
        ):
            held, later = await one.enter(), await two.enter()
            await held.write(frame[:-1])
            await until(lambda: target.network.unfinished > MEBIBYTE // 2)
            with suppress(ConnectionError):  # it may be closed while we write
                await later.write(struct.pack("<I", 2 * MEBIBYTE) + bytes(2 * MEBIBYTE - 1))
            await later.until_closed()
            assert not target.network.bans.seconds_left(two.me)  # there was no room, and that is no fault of its own
            await held.write(frame[-1:] + large)  # from here on the first is no newcomer
            await until(lambda: len(target.came) == 2)
            late = await two.enter()
            await late.write(large)  # more than all newcomers may have together: alone, and quickly
            await until(lambda: len(target.came) == 3)

    asyncio.run(scenario())
    target.network.close()


def test_what_waits_for_all_peers_is_bounded_and_the_slowest_is_lost(tmp_path: Path) -> None:
    target = Peer(tmp_path / "key", P2PConfig(queues_limit=48 * MEBIBYTE))
    message = HiddenFrame("s", 0, 0, Array("float32", (256, 1024), memoryview(bytes(MEBIBYTE))))

    async def scenario() -> None:
        async with (
            Hostile(tmp_path / "one", target.me, target.addresses, None) as one,
            Hostile(tmp_path / "two", target.me, target.addresses, None) as two,
        ):
            await one.enter()
            await two.enter()
            await until(lambda: target.network.peers == 2)
            while not target.lost:
                for peer in (one.me, two.me):
                    target.network.send(peer, message)
                assert target.network.waiting <= 50 * MEBIBYTE
                await asyncio.sleep(0.001)

    asyncio.run(scenario())
    target.network.close()


def test_what_arrives_is_bounded_too(tmp_path: Path) -> None:
    target = Peer(tmp_path / "key", P2PConfig(frame_limit=8 * MEBIBYTE))
    target.network.bound(6 * MEBIBYTE)  # a third of it for what comes in, half of that for one peer
    part = struct.pack("<I", MEBIBYTE) + bytes(MEBIBYTE - 1)
    large = bytes_of(HiddenFrame("s", 0, 0, Array("float32", (1024, 1024), memoryview(bytes(4 * MEBIBYTE)))))

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            hostile = [Hostile(tmp_path / name, target.me, target.addresses, None) for name in ("one", "two", "three")]
            peers = [await stack.enter_async_context(peer) for peer in hostile]
            first, second, third = [await peer.enter() for peer in peers]
            for stream in (first, second):
                await stream.write(part)
            await until(lambda: target.network.unfinished == 2 * (MEBIBYTE - 1))
            with suppress(ConnectionError):  # it may be closed while we write
                await third.write(part)
            await third.until_closed()
            assert not target.network.bans.seconds_left(peers[2].me)  # there was no room, and that is no fault of its own
            again = await peers[2].enter()
            await again.write(large)  # more than there is room for: beside the others, and alone of its kind
            await until(lambda: len(target.came) == 1)

    asyncio.run(scenario())
    assert target.lost
    with pytest.raises(CallerError, match="fewer tokens"):
        target.network.send("QmA", HiddenFrame("s", 0, 0, Array("float32", (1024, 4096), memoryview(bytes(2**24)))))
    target.network.close()
    target.network.close()
    with pytest.raises(NetworkError, match="left the swarm"):
        target.network.send("QmA", Ping(1))
