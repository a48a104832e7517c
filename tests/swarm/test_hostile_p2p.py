"""A real session over libp2p beside peers that are not peers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from corolla.client.swarm import SwarmTransport
from corolla.engine.engine import Engine, EngineConfig
from corolla.messages import Hop, Ping
from corolla.models.reference import Reference
from corolla.models.span import load_span
from corolla.server.node import SpanServer
from corolla.swarm import frames
from corolla.swarm.connection import P2PConfig
from corolla.swarm.p2p import P2PNetwork
from corolla.types import Span
from tests.models import tiny
from tests.swarm.daemons import Daemon, Hostile
from tests.swarm.hostile import CONFIG, COUNT, PROMPT, Swarm, answer, record, rows, step

Attack = Callable[[Hostile], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


async def _floods(hostile: Hostile) -> None:
    stream = await hostile.enter()
    with suppress(ConnectionError):
        await stream.write(b"".join(frames.encode(Ping(1))) * 100_000)


async def _sends_noise(hostile: Hostile) -> None:
    while not await hostile.refused():
        stream = await hostile.enter()
        with suppress(ConnectionError):
            await stream.write(b"\xff" * 2**16)
        await stream.until_closed()


async def _sends_rows_of_nothing(hostile: Hostile) -> None:
    stream = await hostile.enter()
    bad = step(**rows(float("nan")), route=(Hop("t", 0, 1), Hop("s", 1, 4)), hop=1)
    with suppress(ConnectionError):
        await stream.write(b"".join(b"".join(frames.encode(bad)) for _ in range(1000)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind finds its daemon through a deprecated function
@pytest.mark.parametrize("attack", [_floods, _sends_noise, _sends_rows_of_nothing])
def test_a_session_over_libp2p_goes_on_beside(
    directory: Path, tmp_path: Path, attack: Callable[[Hostile], Coroutine[Any, Any, None]]
) -> None:
    target = Daemon(tmp_path / "server")
    engine = Engine(load_span(directory, Span(0, 4), dtype="float32"), EngineConfig(cache_tokens=2048, page_size=16))
    engine.start()
    network = P2PNetwork(target, P2PConfig(frames_per_second=1000.0))
    server = SpanServer(engine, network, CONFIG)
    router = Swarm(directory)
    router.records["s"] = record(network.me, 0, 4)
    client = SwarmTransport(P2PNetwork(Daemon(tmp_path / "client", target.addresses)), router)

    async def beside() -> tuple[list[int], int]:
        async with Hostile(tmp_path / "hostile", network.me, target.addresses, None) as hostile:
            attacking = asyncio.create_task(attack(hostile))
            while not attacking.done() and not any(network.counts.values()):
                await asyncio.sleep(0.01)
            before = psutil.Process().memory_info().rss
            answered = await asyncio.to_thread(answer, client)
            grown = psutil.Process().memory_info().rss - before
            attacking.cancel()
            await asyncio.wait([attacking])
        return answered, grown

    answered, grown = asyncio.run(beside())
    assert answered == Reference(directory).greedy(PROMPT, COUNT)
    assert grown < 64 * 2**20
    assert not client.bans.banned()
    client.close()
    server.close()
    engine.check_integrity()
