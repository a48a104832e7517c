"""A swarm within one process: servers of spans by name, and one client."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

from corolla.client.patience import Patience
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.parts import EngineParts
from corolla.engine.speculation import Guess, guess
from corolla.errors import NoRoute
from corolla.models.span import load_span
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm.network import LocalHub
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import Quality, Route, WantedAdapter, find_route, seconds_along
from corolla.types import GenerationSettings, Span
from tests.swarm.simulation import make_record

SETTINGS = GenerationSettings(max_tokens_to_generate=30)
SAMPLED = GenerationSettings(max_tokens_to_generate=30, do_sample=True, temperature=0.9, seed=5, repetition_penalty=1.3)
PROMPT = [5 + i * 11 % 180 for i in range(90)]
TIMEOUT = 10.0


class Swarm:
    """Servers by name, and one client; `device` is the servers'."""

    def __init__(self, directory: Path, guess: Guess = guess, device: str = "cpu") -> None:
        self.hub = LocalHub()
        self.directory, self.guess, self.device = directory, guess, device
        self.records: dict[str, ServerRecord] = {}
        self.servers: dict[str, SpanServer] = {}
        self.engines: dict[str, Engine] = {}
        self.routes: list[Route] = []
        self.transport = SwarmTransport(self.hub.join("client"), self, patience=Patience(silence=0.5, answer=0.5, reconsider=0.2, lost=1.0))

    def add(self, name: str, start: int, end: int, throughput: float = 100.0, cache_tokens: int = 2048) -> None:
        model = load_span(self.directory, Span(start, end), dtype="float32", device=self.device)
        engine = Engine(model, EngineConfig(cache_tokens=cache_tokens, page_size=16, step_rows=32), EngineParts(guess=self.guess))
        engine.start()
        self.engines[name] = engine
        self.servers[name] = SpanServer(engine, self.hub.join(name), SpanServerConfig(wire_dtype="float32"))
        self.records[name] = make_record(name, start, end, blocks=4, throughput=throughput, expires=time.time() + 1e6)

    def kill(self, name: str) -> None:
        """The process is gone at once; the directory still lists it."""
        self.hub.kill(name)
        self.engines[name].stop()

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None, adapter: WantedAdapter | None = None) -> Route:
        route = find_route(
            self.records.values(), blocks=4, now=time.time(), banned=avoid, needed_tokens=needed_tokens, like=like, adapter=adapter
        )
        self.routes.append(route)
        return route

    def quicker(self, route: Route, avoid: Collection[str], needed_tokens: int, adapter: WantedAdapter | None = None) -> Route | None:
        try:
            best = find_route(self.records.values(), blocks=4, now=time.time(), banned=avoid, needed_tokens=needed_tokens, adapter=adapter)
        except NoRoute:
            return None
        seconds = seconds_along(self.records.values(), route, blocks=4)
        return best if seconds is not None and best.seconds * 2 < seconds else None

    def close(self) -> None:
        self.transport.close()
        for server in self.servers.values():
            server.close()


def answer(swarm: Swarm, settings: GenerationSettings = SETTINGS, at: dict[int, Callable[[], None]] | None = None) -> list[int]:
    """The answer's tokens; `at[n]` is done when n tokens are there."""
    with Session(swarm.transport, "") as session:
        tokens = []
        for token in session.generate(PROMPT, settings, timeout=TIMEOUT):
            tokens.append(token.token_id)
            if at and len(tokens) in at:
                at[len(tokens)]()
    return tokens
