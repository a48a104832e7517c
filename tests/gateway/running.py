"""A gateway over a swarm of tiny models within this process, behind a real uvicorn; and engines that answer as slowly as a test wants."""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from corolla.client.swarm import SwarmTransport
from corolla.engine.engine import Engine, EngineConfig
from corolla.gateway.database import Database
from corolla.gateway.model_registry import Models, served_model
from corolla.gateway.serve import server_config
from corolla.gateway.service import Gateway, GatewayConfig
from corolla.models.span import load_span
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm.network import LocalHub
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import Route, find_route
from corolla.types import Span
from tests import toy
from tests.models import tiny

CONTEXT = 512
BLOCKS = 4
DEADLINE = 60.0


def make_model(directory: Path, **changes: Any) -> Path:
    """A tiny Llama with a tokenizer that knows every byte, and a chat template."""
    tokenizer = toy.byte_level()
    toy.make_directory(directory, tokenizer, model_type="llama", template=toy.CHATML)
    return tiny.save("llama", directory, vocab_size=tokenizer.get_vocab_size(), eos_token_id=toy.END, **changes)


@dataclass
class TinySwarm:
    """Servers of one model by name; a `Router` over what they say of themselves."""

    directory: Path
    spans: dict[str, tuple[int, int]] = field(default_factory=lambda: {"first": (0, 2), "last": (2, 4)})
    cache_tokens: int = 16384

    def __post_init__(self) -> None:
        self.hub = LocalHub()
        self.engines: dict[str, Engine] = {}
        self._servers: list[SpanServer] = []
        for name, span in self.spans.items():
            engine = Engine(load_span(self.directory, Span(*span), dtype="float32"), EngineConfig(cache_tokens=self.cache_tokens))
            engine.start()
            self.engines[name] = engine
            self._servers.append(SpanServer(engine, self.hub.join(name), SpanServerConfig(wire_dtype="float32")))
        self.transport = SwarmTransport(self.hub.join("client"), self)
        self.gone: set[str] = set()

    def records(self) -> list[ServerRecord]:
        return [_record(name, span, quick=name) for name, span in self.spans.items() if name not in self.gone]

    def route(self, avoid: Any, needed_tokens: int, like: Any = None, adapter: Any = None) -> Route:
        return find_route(self.records(), blocks=BLOCKS, now=time.time(), banned=avoid, needed_tokens=needed_tokens, like=like)

    def quicker(self, route: Route, avoid: Any, needed_tokens: int, adapter: Any = None) -> None:
        return None

    def kill(self, name: str) -> None:
        self.gone.add(name)
        self.hub.kill(name)

    @contextmanager
    def held(self, name: str) -> Iterator[Callable[[], None]]:
        """That server computes nothing until the block ends, or what it yields is called."""
        over = threading.Event()

        def hold() -> Iterator[None]:
            over.wait(DEADLINE)
            yield

        self.engines[name].call(hold())
        try:
            yield over.set
        finally:
            over.set()

    @property
    def pages_in_use(self) -> int:
        return sum(engine.pool.num_pages - engine.pool.free_pages for engine in self.engines.values())

    def close(self) -> None:
        self.transport.close()
        for server in self._servers:
            server.close()


def _record(name: str, span: tuple[int, int], *, quick: str) -> ServerRecord:
    # The later name is the slower server, so that a spare is taken only when it is needed.
    return ServerRecord(
        peer=name,
        name=name,
        model="m",
        checkpoint="c",
        start=span[0],
        end=span[1],
        blocks=BLOCKS,
        hidden=64,
        dtype="float32",
        weights="packed",
        throughput=1.0 if quick.startswith("spare") else 1000.0,
        free_tokens=CONTEXT,
        active=0,
        round_trips={},
        addresses=(),
        version="0",
        state="ready",
        expires=time.time() + 600,
    )


@dataclass
class Running:
    """A gateway that answers at `url`."""

    url: str
    gateway: Gateway
    swarm: TinySwarm
    server: uvicorn.Server

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=DEADLINE, **options)

    def wait_until(self, true: Callable[[], bool], seconds: float = DEADLINE) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, "it did not come to pass"
            time.sleep(0.01)


def all_of(act: Callable[[], object], times: int) -> None:
    """Do something on so many threads at once, and wait for all of them."""
    threads = [threading.Thread(target=act, daemon=True) for _ in range(times)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * DEADLINE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "some of them did not end"


@contextmanager
def running(
    swarm: TinySwarm,
    database: Path | str,
    config: GatewayConfig | None = None,
    others: Mapping[str, TinySwarm] | None = None,
    **served: Any,
) -> Iterator[Running]:
    """A gateway over `swarm`, whose model is "tiny", and over `others` by their models' names, until the block ends.

    `served` changes what it knows of the models.
    """
    kept = Database(str(database))
    swarms = {"tiny": swarm, **(others or {})}
    models = [served_model(name, each.directory, each.transport, "any", CONTEXT, each.records) for name, each in swarms.items()]
    models = [dataclasses.replace(model, **served) for model in models]
    gateway = Gateway(Models(models), kept, config or GatewayConfig(drain=0.5))
    settings = server_config(gateway)
    settings.port = 0
    uvicorn_server = uvicorn.Server(settings)
    thread = threading.Thread(target=lambda: asyncio.run(_serve(uvicorn_server, gateway)), name="gateway", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + DEADLINE
        while not uvicorn_server.started:
            assert thread.is_alive(), "the gateway did not start"
            assert time.monotonic() < deadline, "the gateway did not start in time"
            time.sleep(0.01)
        port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", gateway, swarm, uvicorn_server)
    finally:
        uvicorn_server.should_exit = True
        thread.join(DEADLINE)
        if thread.is_alive():
            faulthandler.dump_traceback()
        assert not thread.is_alive(), "the gateway does not end: where its threads are stands on standard error"
        kept.close()


async def _serve(server: uvicorn.Server, gateway: Gateway) -> None:
    """As `gateway.serve` does it: the gateway hears at once that it is to end."""

    async def tell() -> None:
        while not server.should_exit:
            await asyncio.sleep(0.05)
        gateway.begin_to_close()

    telling = asyncio.create_task(tell())
    await server.serve()
    await telling
