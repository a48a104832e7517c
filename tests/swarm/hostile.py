"""A swarm in one process for tests of hostile peers: servers that alter their messages, and a client that sends what it likes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from corolla.client.patience import Patience
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.engine.engine import Engine, EngineConfig, EngineParts
from corolla.engine.speculation import Guess, guess
from corolla.messages import FailedFrame, Hop, Ping, Pong, SettingsFrame, StepFrame, WireMessage
from corolla.models.span import load_span
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm.arrays import to_array
from corolla.swarm.network import LocalHub
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import Quality, Route, find_route
from corolla.types import GenerationSettings, Span
from tests.models import tiny
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

Alter = Callable[[WireMessage], WireMessage | list[WireMessage]]
"""What a peer sends, or gets, in the place of a message."""


class Swarm:
    """Servers a, b and c, one of them hostile; an honest one for each of them, which is slower; and honest clients."""

    def __init__(self, directory: Path, guess: Guess = guess) -> None:
        self.hub = LocalHub()
        self.guess = guess
        self.hub.intercept = self._intercept
        self.directory = directory
        self.records: dict[str, ServerRecord] = {}
        self.servers: dict[str, SpanServer] = {}
        self.engines: dict[str, Engine] = {}
        self.alters: dict[str, Alter] = {}  # of what a server sends
        self.gets: dict[str, Alter] = {}  # of what comes to it
        self.altered: Counter[str] = Counter()  # messages, by the server
        self.transports: list[SwarmTransport] = []
        self.routes: list[Route] = []

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
        model = load_span(self.directory, Span(start, end), dtype="float32")
        engine = Engine(model, EngineConfig(cache_tokens=cache, page_size=16), EngineParts(guess=self.guess))
        engine.start()
        self.engines[name] = engine
        self.alters[name] = alter
        self.servers[name] = SpanServer(engine, self.hub.join(name), config)
        self.records[name] = record(name, start, end, throughput)
        return self.servers[name]

    def client(self, name: str, *, silence: float = 2.0, answer: float = 2.0, lost: float = 1.0) -> SwarmTransport:
        patience = Patience(silence=silence, answer=answer, lost=lost)
        transport = SwarmTransport(self.hub.join(name), self, patience=patience, vocabulary=tiny.VOCABULARY)
        self.transports.append(transport)
        return transport

    def route(self, avoid: Any, needed_tokens: int, like: Quality | None = None, adapter: Any = None) -> Route:
        route = find_route(self.records.values(), blocks=4, now=time.time(), banned=avoid, needed_tokens=needed_tokens)
        self.routes.append(route)
        return route

    def quicker(self, route: Route, avoid: Any, needed_tokens: int, adapter: Any = None) -> Route | None:
        return None

    def _intercept(self, sender: str, receiver: str, message: WireMessage) -> list[tuple[float, WireMessage]]:
        messages = [message]
        for name, alter in ((sender, self.alters.get(sender)), (receiver, self.gets.get(receiver))):
            if alter is not None:
                made = [alter(each) for each in messages]
                changed = [each for many in made for each in (many if isinstance(many, list) else [many])]
                self.altered[name] += changed != messages
                messages = changed
        return [(0.0, each) for each in messages]

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


def answer(transport: SwarmTransport, settings: GenerationSettings = GREEDY, prompt: Sequence[int] = PROMPT) -> list[int]:
    with Session(transport, "") as session:
        return [token.token_id for token in session.generate(prompt, settings, timeout=PATIENCE)]


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


def named(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(case, id=name) for name, case in cases.items()]
