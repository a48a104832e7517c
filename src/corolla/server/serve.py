"""A server of a span in a swarm: loads it, joins, announces itself until it is stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import corolla
from corolla.engine.engine import Engine, EngineConfig
from corolla.errors import NetworkError
from corolla.models.catalog import resolve
from corolla.models.checkpoint import Checkpoint, Progress
from corolla.models.families import architecture
from corolla.models.linear import WeightFormat
from corolla.models.span import load_span
from corolla.server.embedded import fast_dtype
from corolla.server.node import SpanServer, SpanServerConfig
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.placement import choose_span
from corolla.swarm.records import ServerRecord, State, fingerprint
from corolla.types import Close, GenerationSettings, Reply, Span, Step

log = logging.getLogger(__name__)
_MEASURED_STEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    span: Span | None = None  # None: what the swarm lacks most, as large as the memory holds
    capacity: int | None = None  # blocks, where the span is chosen; None: all
    name: str = ""
    dtype: str | None = None
    weights: WeightFormat | None = None
    threads: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    announce_every: float = 5.0  # seconds
    lifetime: float = 20.0  # of an announcement, in seconds: how long a server that died is still listed


class RunningServer:
    """A server that is up. `addresses` are what others join through."""

    def __init__(self, peer: SwarmPeer, engine: Engine, model_id: str, config: ServeConfig) -> None:
        self._peer, self._engine, self._model_id, self._config = peer, engine, model_id, config
        self.span = engine.model.span
        self._throughput = measure_throughput(engine)
        engine.start()
        self._server = SpanServer(engine, peer.network, SpanServerConfig(wire_dtype=_name_of(engine.model.dtype)))
        self._stopping = threading.Event()
        self._announce("ready")
        self._announcing = threading.Thread(target=self._keep_announced, name="corolla-announce", daemon=True)
        self._announcing.start()

    @property
    def addresses(self) -> list[str]:
        return self._peer.addresses

    def close(self) -> None:
        """Withdraw the record, leave the swarm, stop the engine."""
        self._stopping.set()
        self._announcing.join()
        with contextlib.suppress(NetworkError):
            self._peer.withdraw()
        self._server.close()
        self._peer.close()

    def _keep_announced(self) -> None:
        while not self._stopping.wait(self._config.announce_every):
            try:
                self._announce("ready")
            except NetworkError as error:
                log.warning("the announcement did not go out: %s", error)

    def _announce(self, state: State) -> None:
        model, pool = self._engine.model, self._engine.pool
        self._peer.publish(
            ServerRecord(
                peer=self._peer.network.me,
                name=self._config.name,
                model=self._model_id,
                start=model.span.start,
                end=model.span.end,
                blocks=model.arch.blocks,
                dtype=_name_of(model.dtype),
                weights=model.weights,
                throughput=self._throughput,
                free_tokens=pool.num_pages * pool.page_size,
                active=self._engine.active,
                round_trips={},
                addresses=(),
                version=corolla.__version__,
                state=state,
                expires=time.time() + self._config.lifetime,
            )
        )


@contextmanager
def serving(model: str, peer: PeerConfig, config: ServeConfig, progress: Progress | None = None) -> Iterator[RunningServer]:
    """Join a swarm and serve a span of `model` until the block ends.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel, InvalidSetting, NetworkError: as their sentences say.
    """
    directory = resolve(model, progress=progress)
    model_id = model_fingerprint(directory)
    joined = SwarmPeer(peer)  # before any thread of torch
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.dtype or fast_dtype(device)
        weights: WeightFormat = config.weights or ("packed" if device == "cpu" else "plain")
        if config.span is None:
            alike = [r for r in joined.servers(model_id) if (r.dtype, r.weights) == (dtype, weights)]
            span = _choose(directory, alike, config.capacity)
        else:
            span = config.span
        report = None if progress is None else lambda done, total: progress("loading", done, total)
        loaded = load_span(directory, span, dtype=dtype, weights=weights, device=device, progress=report)
        running = RunningServer(joined, Engine(loaded, config.engine), model_id, config)
    except BaseException:
        joined.close()
        raise
    try:
        yield running
    finally:
        running.close()


def model_fingerprint(directory: Path) -> str:
    """What names a model in the directory: the same for everybody who has the same checkpoint's config."""
    return fingerprint(json.loads((directory / "config.json").read_bytes()))


def measure_throughput(engine: Engine) -> float:
    """Rows a second through one block, over single steps of an engine that is not started."""
    model = engine.model
    replies: list[Reply] = []
    settings = GenerationSettings(max_tokens_to_generate=1) if model.heads else None
    seconds = []
    for position in range(_MEASURED_STEPS):
        payload = [0] if model.embeds else torch.zeros(1, model.arch.hidden, dtype=model.dtype)
        engine.receive(Step("measure", position, payload, settings=settings, tokens=(0,)), replies.append)
        began = time.perf_counter()
        engine.run_once()
        seconds.append(time.perf_counter() - began)
    engine.receive(Close("measure"))
    engine.run_once()
    return len(model.span) / sorted(seconds)[len(seconds) // 2]


def _choose(directory: Path, others: list[ServerRecord], capacity: int | None) -> Span:
    with Checkpoint(directory) as checkpoint:
        blocks = architecture(checkpoint.config).blocks
    known = [record.throughput for record in others]
    # This server has not measured itself yet: it takes itself for one like the others.
    throughput = statistics.median(known) if known else 1.0
    return choose_span(others, blocks=blocks, capacity=blocks if capacity is None else capacity, throughput=throughput)


def _name_of(dtype: torch.dtype) -> Literal["float32", "bfloat16", "float16"]:
    names: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[dtype]
