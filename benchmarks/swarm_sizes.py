"""Parts of swarm.py: bytes on the wire, memory of a client."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import psutil

from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.engine.engine import Engine, EngineConfig
from corolla.messages import Hop, StepFrame, Token, WireMessage
from corolla.models.span import load_span
from corolla.server.node import SpanServer, SpanServerConfig
from corolla.swarm import frames
from corolla.swarm.network import LocalHub
from corolla.swarm.routing import Quality, Route, WantedAdapter
from corolla.types import GenerationSettings, Span
from swarm_bench import PROMPT, Bench
from swarm_servers import COROLLA, CorollaSwarm, even_spans


class CountingHub(LocalHub):
    """Peers in one process whose frames are counted as they would be written to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[WireMessage, int]] = []

    def carry(self, sender: str, receiver: str, message: WireMessage) -> None:
        self.sent.append((message, sum(memoryview(part).nbytes for part in frames.encode(message))))
        super().carry(sender, receiver, message)


def wire_bytes(bench: Bench) -> None:
    """Frames as the servers' own code makes them, over a counting network; and what connections of real processes carry,
    less what they carry while nobody asks anything.
    """
    new_tokens, silence = 192, 10.0  # tokens, seconds
    hub = CountingHub()
    spans = even_spans(bench.blocks, 3)
    route = Route(tuple(Hop(f"server-{start}", start, end) for start, end in spans), seconds=0.0)
    transport = SwarmTransport(hub.join("client"), OneRoute(route))
    config = EngineConfig(drafts=0)
    engines = [Engine(load_span(bench.directory, Span(start, end), dtype="bfloat16", weights="packed"), config) for start, end in spans]
    servers = [
        SpanServer(engine, hub.join(hop.peer), SpanServerConfig(wire_dtype="bfloat16"))
        for engine, hop in zip(engines, route.hops, strict=True)
    ]
    for engine in engines:
        engine.start()
    try:
        with Session(transport, "") as session:
            for _ in session.generate(bench.prompt(PROMPT), GenerationSettings(max_tokens_to_generate=new_tokens), timeout=60.0):
                pass
    finally:
        transport.close()
        for server in servers:
            server.close()
    steps = [(message, size) for message, size in hub.sent if isinstance(message, StepFrame) and len(message.tokens) == 1]
    hidden = [float(size) for message, size in steps if message.hidden is not None]
    ring = [float(size) for message, size in steps if message.hidden is None]
    tokens = [float(size) for message, size in hub.sent if isinstance(message, Token)]

    with bench.processes() as processes:
        swarm = bench.swarm(processes, 3, dtype="bfloat16", proxied=True)
        client = swarm.client()
        bench.check("the swarm", client)

        idle = carried(swarm, lambda: time.sleep(silence)) / silence

        def measure(_round: int) -> Mapping[str, float]:
            began = time.perf_counter()
            busy = carried(swarm, lambda: client.answer(bench.prompt(1), new_tokens))  # a longer prompt is hidden states of its own
            return {"carried": (busy - idle * (time.perf_counter() - began)) / new_tokens}

        figures = bench.rounds({"connections": measure})
    values = engines[0].model.arch.hidden
    table = bench.table
    table.add("frame that closes the ring, one token", "bytes", ring)
    table.add("frame to the client, one token", "bytes", tokens)
    table.add("all connections, encryption and multiplexing included, per token through 3 servers", "bytes", figures["carried"])
    table.add("frame between servers, one token, bf16", "bytes", hidden)
    name = f"frame between servers, one token / hidden size × 2 ({values * 2} bytes)"
    table.add(name, "x", [size / (values * 2) for size in hidden], reach=1.1, at_most=True)


@dataclass(frozen=True, slots=True)
class OneRoute:
    """A `Router` that knows one way."""

    only: Route

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None, adapter: WantedAdapter | None = None) -> Route:
        return self.only

    def quicker(self, route: Route, avoid: Collection[str], needed_tokens: int, adapter: WantedAdapter | None = None) -> Route | None:
        return None


def carried(swarm: CorollaSwarm, act: Callable[[], object]) -> int:
    before = swarm.bytes_carried
    act()
    return swarm.bytes_carried - before


# Memory of a client.

_BARE = "import hivemind, psutil; print(psutil.Process().memory_info().rss)"


def memory(bench: Bench) -> None:
    """`corolla generate --peers` as it is, looked at from outside every 10 ms; the most that it held counts."""
    with bench.processes() as processes:
        swarm = bench.swarm(processes, 3)
        asked = ["-p", "The capital of France is", "--max-new-tokens", "64"]
        command = [*COROLLA, "generate", str(bench.directory), "--peers", swarm.address, *asked]

        def measure(_round: int) -> Mapping[str, float]:
            bare = int(subprocess.run([sys.executable, "-c", _BARE], stdout=subprocess.PIPE, check=True).stdout)
            client = processes.start(command)
            own, others = peaks(client)
            if "Paris" not in processes.log(client):
                raise processes.fail(client, "`corolla generate` did not answer as it should")
            return {"bare": bare / 1e6, "own": own / 1e6, "beyond": (own - bare) / 1e6, "others": others / 1e6}

        figures = bench.rounds({"a client": measure})
    table = bench.table
    table.add("memory of a process after `import hivemind`", "MB", figures["bare"])
    table.add("memory of `corolla generate --peers`, at most", "MB", figures["own"])
    table.add("memory of its hivemind process and libp2p daemon, what is theirs alone", "MB", figures["others"])
    table.add("client memory beyond `import hivemind`", "MB", figures["beyond"], reach=80.0, aim=40.0, at_most=True)


def peaks(process: subprocess.Popen[str]) -> tuple[int, int]:
    """The most bytes that a process held until it ended, and that its children held of their own together."""
    own = others = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            own = max(own, watched.memory_info().rss)
            others = max(others, sum(child.memory_full_info().uss for child in watched.children(recursive=True)))
        time.sleep(0.01)
    return own, others
