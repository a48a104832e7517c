"""Servers of tiny models within one process, and a client of them whose messages may bring misfortune."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from corolla.engine.engine import Engine, EngineConfig
from corolla.messages import WireMessage
from corolla.models.span import load_span
from corolla.remote.calls import RemoteCalls
from corolla.remote.servers import RemoteConfig, Servers
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm.bans import BanPolicy, Bans
from corolla.swarm.network import LocalHub, LocalNetwork, OnLost, OnMessage
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import Quality, Route, find_route
from corolla.types import Span
from tests.swarm.simulation import make_record

BLOCKS = 4


class Local:
    """Servers by name, with their blocks; those named earlier are taken first.

    `before` is called before each message of the client, with who gets it; what it returns goes in the message's place, if anything.
    """

    def __init__(self, directory: Path, servers: dict[str, tuple[int, int]], *, cache_tokens: int = 1024, **config: Any) -> None:
        self.hub = LocalHub()
        self.before: Callable[[str, WireMessage], WireMessage | None] = lambda peer, message: message
        self.records = [record(name, *span, quick=len(servers) - place) for place, (name, span) in enumerate(servers.items())]
        self.spans: list[SpanServer] = []
        for name, span in servers.items():
            engine = Engine(
                load_span(directory, Span(*span), dtype="float32"), EngineConfig(cache_tokens=cache_tokens, page_size=16, step_rows=32)
            )
            engine.start()
            self.spans.append(SpanServer(engine, self.hub.join(name), SpanServerConfig(wire_dtype="float32")))
        settings = RemoteConfig(**{"request_timeout": 30.0, "silence": 0.5, "answer": 10.0, **config})
        bans = Bans(policy=BanPolicy(shortest=60.0))
        self.servers = Servers(_Watched(self, self.hub.join("client")), self, BLOCKS, bans=bans, config=settings)
        self.calls = RemoteCalls(self.servers)

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None) -> Route:
        return find_route(self.records, blocks=BLOCKS, now=time.time(), banned=avoid, needed_tokens=needed_tokens, like=like)

    def close(self) -> None:
        self.calls.close()
        self.servers.close()
        for server in self.spans:
            server.close()


class _Watched:
    """A `Network` that shows what goes out."""

    def __init__(self, local: Local, network: LocalNetwork) -> None:
        self._local, self._network = local, network
        self.me = network.me

    def listen(self, on_message: OnMessage, on_lost: OnLost) -> None:
        self._network.listen(on_message, on_lost)

    def send(self, peer: str, message: WireMessage) -> None:
        passed_on = self._local.before(peer, message)
        if passed_on is not None:
            self._network.send(peer, passed_on)

    def send_all(self, messages: Sequence[tuple[str, WireMessage]]) -> None:
        for peer, message in messages:
            self.send(peer, message)

    @property
    def counts(self) -> Mapping[str, int]:
        return self._network.counts

    def close(self) -> None:
        self._network.close()


def record(peer: str, start: int, end: int, *, quick: int = 1) -> ServerRecord:
    return make_record(peer, start, end, blocks=BLOCKS, throughput=1000.0 * 4**quick, free_tokens=512, expires=time.time() + 600)


def killing(local: Local, kind: type | Sequence[type], victim: str, *, nth: int = 1) -> list[str]:
    """From now on the `nth` message of a kind to `victim` kills it instead of arriving; the list fills with what was killed."""
    killed: list[str] = []
    left = [nth]

    def before(peer: str, message: WireMessage) -> WireMessage | None:
        if peer == victim and isinstance(message, tuple(kind) if isinstance(kind, Sequence) else kind):
            left[0] -= 1
            if left[0] == 0:
                killed.append(peer)
                local.hub.kill(peer)
                return None
        return message

    local.before = before
    return killed
