"""Hostile servers and clients among honest ones: what they send, and that nobody else notices.

Bytes that are no frame hardly come this far: see test_p2p.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from corolla.client.session import Session
from corolla.client.swarm import Patience, SwarmTransport
from corolla.engine.engine import Engine, EngineConfig
from corolla.errors import CallerError
from corolla.models.reference import Reference
from corolla.models.span import load_span
from corolla.server.node import SpanServer, SpanServerConfig
from corolla.swarm import frames
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.network import LocalHub, LocalNetwork, OnLost, OnMessage
from corolla.swarm.p2p import P2PConfig, P2PNetwork
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import Quality, Route, find_route
from corolla.swarm.wire import (
    Array,
    CloseFrame,
    FailedFrame,
    ForwardFrame,
    GapFrame,
    Hop,
    Ping,
    Pong,
    SettingsFrame,
    StepFrame,
    TokenFrame,
    WireMessage,
)
from corolla.types import GenerationSettings, Span
from tests.models import tiny
from tests.swarm.daemons import Daemon, Hostile
from tests.swarm.simulation import make_record

COUNT = 12  # tokens of an answer
PROMPT = [5 + i * 11 % 180 for i in range(40)]
# The penalty makes the head look at every token id that came with the rows.
PENALIZED = GenerationSettings(max_tokens_to_generate=COUNT, repetition_penalty=1.3)
GREEDY = GenerationSettings(max_tokens_to_generate=COUNT)
PATIENCE = 60.0  # seconds for anything that should happen, on a loaded machine
BIG = 2**62
HIDDEN = 64  # values in a row of the tiny model

CONFIG = SpanServerConfig(wire_dtype="float32")

Alter = Callable[[WireMessage], WireMessage]
Attack = Callable[[Hostile], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


class Tampering:
    """A network whose peer changes some of the messages that it sends."""

    def __init__(self, network: LocalNetwork, alter: Alter) -> None:
        self._network, self._alter = network, alter
        self.me = network.me
        self.altered = 0

    def listen(self, on_message: OnMessage, on_lost: OnLost) -> None:
        self._network.listen(on_message, on_lost)

    def send(self, peer: str, message: WireMessage) -> None:
        altered = self._alter(message)
        self.altered += altered is not message
        self._network.send(peer, altered)

    def send_all(self, messages: Sequence[tuple[str, WireMessage]]) -> None:
        for peer, message in messages:
            self.send(peer, message)

    def close(self) -> None:
        self._network.close()


class Swarm:
    """Servers a, b and c, one of them hostile; an honest one for each of them, which is slower; and honest clients."""

    def __init__(self, directory: Path) -> None:
        self.hub = LocalHub()
        self.directory = directory
        self.records: dict[str, ServerRecord] = {}
        self.servers: dict[str, SpanServer] = {}
        self.engines: dict[str, Engine] = {}
        self.networks: dict[str, Tampering] = {}
        self.transports: list[SwarmTransport] = []

    def add(
        self,
        name: str,
        start: int,
        end: int,
        throughput: float = 100.0,
        alter: Alter = lambda message: message,
        cache: int = 2048,
        config: SpanServerConfig = CONFIG,
    ) -> SpanServer:
        engine = Engine(load_span(self.directory, Span(start, end), dtype="float32"), EngineConfig(cache_tokens=cache, page_size=16))
        engine.start()
        self.engines[name] = engine
        self.networks[name] = Tampering(self.hub.join(name), alter)
        self.servers[name] = SpanServer(engine, self.networks[name], config)
        self.records[name] = record(name, start, end, throughput)
        return self.servers[name]

    def client(self, name: str) -> SwarmTransport:
        patience = Patience(silence=2.0, answer=2.0, lost=1.0)
        transport = SwarmTransport(self.hub.join(name), self, patience=patience, vocabulary=tiny.VOCABULARY)
        self.transports.append(transport)
        return transport

    def route(self, avoid: Any, needed_tokens: int, like: Quality | None = None, adapter: Any = None) -> Route:
        return find_route(self.records.values(), blocks=4, now=time.time(), banned=avoid, needed_tokens=needed_tokens)

    def quicker(self, route: Route, avoid: Any, needed_tokens: int, adapter: Any = None) -> Route | None:
        return None

    def check_integrity(self) -> None:
        """No engine has died, and all that is held is accounted for."""
        for engine in self.engines.values():
            eventually(lambda engine=engine: engine.active == 0)
            assert engine._thread is not None
            assert engine._thread.is_alive()
            engine.stop()  # else it may be at work on what clients said at last
            engine.check_integrity()

    def close(self) -> None:
        for transport in self.transports:
            transport.close()
        for server in self.servers.values():
            server.close()


def record(peer: str, start: int, end: int, throughput: float = 100.0) -> ServerRecord:
    return make_record(peer, start, end, blocks=4, throughput=throughput, expires=time.time() + 1e6)


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def answer(transport: SwarmTransport, settings: GenerationSettings = GREEDY) -> list[int]:
    with Session(transport, "") as session:
        return [token.token_id for token in session.generate(PROMPT, settings, timeout=PATIENCE)]


@pytest.fixture
def swarm(directory: Path) -> Iterator[Swarm]:
    swarm = Swarm(directory)
    yield swarm
    swarm.close()


def named(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(case, id=name) for name, case in cases.items()]


# A hostile server, towards the server behind it.


def with_array(change: Callable[[Array], Array]) -> Alter:
    def alter(message: WireMessage) -> WireMessage:
        if not isinstance(message, StepFrame) or message.hidden is None or message.start < len(PROMPT):
            return message
        return msgspec.structs.replace(message, hidden=change(message.hidden))

    return alter


def with_rows(change: Callable[[torch.Tensor], torch.Tensor]) -> Alter:
    return with_array(lambda array: to_array(change(from_array(array)), "float32"))


def with_fields(**fields: Any) -> Alter:
    def alter(message: WireMessage) -> WireMessage:
        if not isinstance(message, StepFrame) or message.hidden is None or message.start < len(PROMPT):
            return message
        return msgspec.structs.replace(message, **fields)

    return alter


TO_SERVERS = {
    "NaN": with_rows(lambda rows: rows * float("nan")),
    "infinity": with_rows(lambda rows: rows + float("inf")),
    "rows too wide": with_rows(lambda rows: rows.repeat(1, 2)),
    "rows too narrow": with_rows(lambda rows: rows[:, :-1]),
    "another dtype": with_array(lambda array: Array("bfloat16", (array.shape[0], 2 * array.shape[1]), array.data)),
    "no rows": with_fields(hidden=None),
    "a token far below the vocabulary": with_fields(tokens=(-BIG,)),
    "a token far above it": with_fields(tokens=(BIG,)),
    "rows at a position out of nowhere": with_fields(start=BIG),
    "rows at a position ahead": with_fields(start=len(PROMPT) + 100),
    "another generation": with_fields(generation=BIG),
}


@pytest.mark.parametrize("alter", named(TO_SERVERS))
def test_what_a_hostile_server_passes_on_is_gone_around(swarm: Swarm, directory: Path, alter: Alter) -> None:
    swarm.add("a", 0, 1)
    swarm.add("b", 1, 3, alter=alter)
    swarm.add("c", 3, 4)
    swarm.add("b2", 1, 3, throughput=1.0)
    honest, bystander = swarm.client("honest"), swarm.client("bystander")
    bystander.bans.blame("b")  # a session that shares servers a and c, and has nothing to do with b
    theirs: list[list[int]] = []
    beside = threading.Thread(target=lambda: theirs.append(answer(bystander, PENALIZED)))
    beside.start()
    ours = answer(honest, PENALIZED)
    beside.join(PATIENCE)
    assert swarm.networks["b"].altered
    assert [ours] == theirs
    assert honest.bans.banned() == {"b"}
    swarm.check_integrity()


# A hostile server, towards the client.


def with_token(**fields: Any) -> Alter:
    def alter(message: WireMessage) -> WireMessage:
        if not isinstance(message, TokenFrame) or message.position < len(PROMPT) + 3:
            return message
        return msgspec.structs.replace(message, **fields)

    return alter


def instead(make: Callable[[TokenFrame], WireMessage]) -> Alter:
    def alter(message: WireMessage) -> WireMessage:
        return make(message) if isinstance(message, TokenFrame) and message.position >= len(PROMPT) + 3 else message

    return alter


TO_CLIENTS = {
    "a token outside the vocabulary": with_token(token_id=tiny.VOCABULARY),
    "a token far outside": with_token(token_id=BIG),
    "a position ahead": with_token(position=BIG),
    "a gap above what it was sent": instead(lambda token: GapFrame(token.session, token.generation, BIG, "c")),
    "gaps for ever": instead(lambda token: GapFrame(token.session, token.generation, 0, "c")),
    "a failure": instead(lambda token: FailedFrame(token.session, token.generation, "ServerFault", "no", peer="c")),
    "an error of no kind": instead(lambda token: FailedFrame(token.session, token.generation, "KeyboardInterrupt", "no", peer="c")),
    "nothing": instead(lambda token: Ping(1)),
}


@pytest.mark.parametrize("alter", named(TO_CLIENTS))
def test_what_a_hostile_server_answers_is_gone_around(swarm: Swarm, directory: Path, alter: Alter) -> None:
    swarm.add("a", 0, 1)
    swarm.add("b", 1, 3)
    swarm.add("c", 3, 4, alter=alter)
    swarm.add("c2", 3, 4, throughput=1.0)
    honest = swarm.client("honest")
    assert answer(honest) == Reference(directory).greedy(PROMPT, COUNT)
    assert swarm.networks["c"].altered
    assert "c" in honest.bans.banned()
    swarm.check_integrity()


def test_only_the_head_answers_tokens(swarm: Swarm, directory: Path) -> None:
    """A server in the middle that sends the client tokens of its own."""
    false: list[StepFrame] = []

    def alter(message: WireMessage) -> WireMessage:
        if isinstance(message, StepFrame) and message.hidden is not None:
            false.append(message)
            swarm.networks["b"]._network.send("honest", TokenFrame(message.session, message.generation, len(PROMPT), 1, -0.1))
        return message

    swarm.add("a", 0, 1)
    swarm.add("b", 1, 3, alter=alter)
    swarm.add("c", 3, 4)
    swarm.add("b2", 1, 3, throughput=1.0)
    honest = swarm.client("honest")
    assert answer(honest) == Reference(directory).greedy(PROMPT, COUNT)
    assert false


# A hostile client.


@pytest.fixture
def whole(swarm: Swarm) -> SpanServer:
    return swarm.add("s", 0, 4)


class Mallory:
    """Somebody who sends what he likes, and reads the answers."""

    def __init__(self, hub: LocalHub, name: str = "mallory") -> None:
        self._network = hub.join(name)
        self.heard: list[WireMessage] = []
        self._network.listen(lambda sender, message: self.heard.append(message), lambda peer: None)

    def send(self, *messages: WireMessage) -> None:
        """Return when all of them have been handled."""
        nonce = len(self.heard) + 1_000_000
        for message in (*messages, Ping(nonce)):
            self._network.send("s", message)
        eventually(lambda: Pong(nonce) in self.heard)

    @property
    def failures(self) -> list[str]:
        return [message.kind for message in self.heard if isinstance(message, FailedFrame)]


WHOLE = (Hop("s", 0, 4),)
BEHIND = (Hop("mallory", 0, 1), Hop("s", 1, 4))
ROWS = to_array(torch.zeros(2, HIDDEN), "float32")
STEP = StepFrame("m", 1, 0, (1, 2), route=WHOLE, client="mallory", settings=SettingsFrame(max_tokens_to_generate=2))


def step(**fields: Any) -> StepFrame:
    return msgspec.structs.replace(STEP, **fields)


def rows(value: float, width: int = HIDDEN) -> dict[str, Any]:
    return {"hidden": to_array(torch.full((2, width), value), "float32")}


FROM_CLIENTS: dict[str, tuple[WireMessage, str]] = {
    "NaN": (step(**rows(float("nan")), output="hidden"), "InvalidSetting"),
    "infinity": (step(**rows(float("inf")), output="hidden"), "InvalidSetting"),
    "finite, and too large, wanting rows": (step(**rows(3e38), output="hidden", settings=None), ""),
    "finite, and too large, wanting tokens": (step(**rows(3e38), route=BEHIND, hop=1), ""),
    "rows too wide": (step(**rows(0.0, 2 * HIDDEN), output="hidden"), "InvalidSetting"),
    "NaN as a server": (step(**rows(float("nan")), route=BEHIND, hop=1), "ServerFault"),
    "tokens as a server": (step(route=BEHIND, hop=1), ""),
    "tokens below the vocabulary": (step(tokens=(-BIG, 1)), "InvalidSetting"),
    "tokens above the vocabulary": (step(tokens=(BIG, 1)), "InvalidSetting"),
    "tokens below the vocabulary, as a server": (
        step(**rows(0.0), route=BEHIND, hop=1, tokens=(-BIG, 1), settings=SettingsFrame(repetition_penalty=1.5)),
        "",
    ),
    "a position out of nowhere": (step(start=BIG), "PromptTooLong"),
    "nothing to compute": (step(tokens=()), "EmptyPrompt"),
    "blocks of nobody": (step(route=(Hop("s", 0, 400),)), "InvalidSetting"),
    "settings out of range": (step(settings=SettingsFrame(temperature=-1.0)), "InvalidSetting"),
    "a hop of somebody else": (step(route=(Hop("t", 0, 4),)), "Unauthorized"),
    "a server before that it is not": (step(route=(Hop("t", 0, 1), Hop("s", 1, 4)), hop=1, **rows(0.0)), "Unauthorized"),
    "no route": (step(route=()), "ServerFault"),
    "the same server again and again": (step(route=tuple(Hop("s", i, i + 1) for i in range(4))), "InvalidSetting"),
    "a call of NaN": (
        ForwardFrame(1, 0, 4, (2,), to_array(torch.full((2, HIDDEN), float("nan")), "float32")),
        "InvalidSetting",
    ),
    "a call of wide rows": (ForwardFrame(1, 0, 4, (2,), to_array(torch.zeros(2, 3 * HIDDEN), "float32")), "InvalidSetting"),
    "a call of other blocks": (ForwardFrame(1, 3, 9, (2,), ROWS), "InvalidSetting"),
}


@pytest.mark.parametrize("case", named(FROM_CLIENTS))
def test_a_hostile_client_gets_a_typed_error_and_the_others_their_answers(
    swarm: Swarm, whole: SpanServer, directory: Path, case: tuple[WireMessage, str]
) -> None:
    message, kind = case
    honest = swarm.client("honest")
    mallory = Mallory(swarm.hub)
    with Session(honest, "") as session:
        tokens = session.generate(PROMPT, GREEDY, timeout=PATIENCE)
        first = next(tokens).token_id
        mallory.send(message)
        if kind:
            eventually(lambda: mallory.failures[:1] == [kind])
        assert [first, *(token.token_id for token in tokens)] == Reference(directory).greedy(PROMPT, COUNT)
    assert not honest.bans.banned()
    assert honest.counters.replays == 0
    swarm.hub.kill("mallory")
    swarm.check_integrity()


def test_a_header_that_grows_on_its_way_ends_no_server(swarm: Swarm, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It fits a frame as it comes, and no longer with what the server adds to it."""
    swarm.add("s", 0, 2)
    swarm.add("t", 2, 4)
    mallory = Mallory(swarm.hub)

    def longest(characters: int) -> StepFrame:
        settings = SettingsFrame(stop_sequences=("x" * characters,))
        return step(route=(Hop("s", 0, 2), Hop("t", 2, 4)), timed=True, settings=settings)

    with caplog.at_level(logging.INFO):
        mallory.send(longest(next(n for n in range(2**16, 0, -1) if _fits(longest(n)))))
        eventually(lambda: "a message was not sent" in caplog.text)
    assert answer(swarm.client("honest")) == Reference(directory).greedy(PROMPT, COUNT)
    swarm.hub.kill("mallory")
    swarm.check_integrity()


def _fits(message: WireMessage) -> bool:
    try:
        frames.encode(message)
    except CallerError:
        return False
    return True


def test_rows_that_do_not_fit_the_wire_end_no_server(swarm: Swarm, directory: Path) -> None:
    swarm.add("s", 0, 4, config=SpanServerConfig(wire_dtype="float16"))
    mallory = Mallory(swarm.hub)
    mallory.send(step(**rows(1e30), output="hidden", settings=None))
    eventually(lambda: mallory.failures == ["ServerFault"])
    assert answer(swarm.client("honest")) == Reference(directory).greedy(PROMPT, COUNT)
    swarm.check_integrity()


def test_sessions_of_others_are_out_of_reach(swarm: Swarm, whole: SpanServer, directory: Path) -> None:
    honest, mallory = swarm.client("honest"), Mallory(swarm.hub)
    with Session(honest, "") as session:
        tokens = session.generate(PROMPT, GREEDY, timeout=PATIENCE)
        first = next(tokens).token_id
        name = session.name
        mallory.send(
            CloseFrame(name),
            step(session=name, generation=BIG),
            step(session=name, generation=BIG, client="honest"),
            step(session=name, generation=1, route=(), start=3),
        )
        assert [first, *(token.token_id for token in tokens)] == Reference(directory).greedy(PROMPT, COUNT)
    assert mallory.failures
    assert honest.counters.replays == 0


def test_sessions_of_clients_that_nobody_knows_do_not_stay(swarm: Swarm, whole: SpanServer, directory: Path) -> None:
    mallory = Mallory(swarm.hub)
    route = (Hop("mallory", 0, 1), Hop("s", 1, 4), *(Hop("x" * 200, i, i + 1) for i in range(4, 200)))
    for batch in range(5):
        mallory.send(
            *(step(session=f"m{batch}.{i}", route=route, hop=1, client=f"c{batch}.{i}", **rows(0.0), settings=None) for i in range(100))
        )
    assert answer(swarm.client("honest")) == Reference(directory).greedy(PROMPT, COUNT)
    eventually(lambda: whole.sessions < 10)
    swarm.check_integrity()


def test_sessions_that_wait_for_their_server_before_take_no_places(swarm: Swarm, directory: Path) -> None:
    """A head has answered one token of each, and the rows of the next never come."""
    places = EngineConfig().max_active
    swarm.add("s", 0, 4, cache=16 * (places + 10))
    mallory = Mallory(swarm.hub)
    mallory.send(*(step(session=f"m{i}", route=BEHIND, hop=1, **rows(0.0)) for i in range(places)))
    eventually(lambda: sum(isinstance(message, TokenFrame) for message in mallory.heard) == places)
    assert answer(swarm.client("honest")) == Reference(directory).greedy(PROMPT, COUNT)
    swarm.hub.kill("mallory")
    swarm.check_integrity()


def test_sessions_in_anothers_name_take_nothing_from_them(swarm: Swarm, directory: Path) -> None:
    server = swarm.add("s", 0, 4, config=replace(CONFIG, sessions_per_client=16))
    honest, mallory = swarm.client("honest"), Mallory(swarm.hub)
    mallory.send(*(step(session=f"m{i}", route=BEHIND, hop=1, client="honest", **rows(0.0), settings=None) for i in range(20)))
    assert server.sessions == 16
    with Session(honest, "") as session:
        tokens = [token.token_id for token in session.generate(PROMPT, GREEDY, timeout=2.0)]
    assert tokens == Reference(directory).greedy(PROMPT, COUNT)


# The same over libp2p: a real session beside peers that are not peers.


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
