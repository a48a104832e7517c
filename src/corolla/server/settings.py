"""What a server offers for as long as it lives: its settings, with what they leave open settled for the machine that it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from corolla.engine.engine import EngineConfig
from corolla.engine.parts import EngineParts
from corolla.errors import InvalidSetting
from corolla.messages import WireDtype
from corolla.models.adapters import load_adapter
from corolla.models.checkpoint import Checkpoint, json_object
from corolla.models.config import ModelConfig
from corolla.models.devices import settled_device
from corolla.models.families import architecture
from corolla.models.linear import WeightFormat
from corolla.models.quantized_files import settled_weights
from corolla.models.span import DTYPES
from corolla.server.capacity import Footprint, available, footprint
from corolla.server.embedded import fast_dtype
from corolla.server.span_manager import Offer, OfferedAdapter
from corolla.swarm.placement import MovePolicy
from corolla.swarm.probing import ProbeConfig
from corolla.swarm.records import ANNOUNCE_EVERY, LIFETIME, MAX_ADAPTERS, fingerprint, is_word
from corolla.types import Span

# One part of so many of the memory is what clients may make a server's engine hold, at most, and what frames on their way may take.
_CLIENTS_PART, _FRAMES_PART = 8, 32
_MOST_FRAMES = 3 * 2**29  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    span: Span | None = None  # None: what the swarm lacks most, and another one when that changes
    capacity: int | None = None  # blocks, where the span is chosen; None: as many as the memory holds
    memory: int | None = None  # bytes for weights, cache and what clients send; None: most of what is available on the device
    name: str = ""
    device: str | None = None  # "cpu", "cuda", "cuda:1"; None: the CPU
    dtype: str | None = None
    weights: WeightFormat | None = None
    wire_dtype: WireDtype | None = None  # of the hidden states sent on; None: that of the model
    threads: int | None = None  # of a CPU's products; None: this machine's cores, shared with the other servers on it
    adapters: Mapping[str, Path] = field(default_factory=dict)  # LoRA adapters to hold: their directories by name
    take_adapters: bool = False  # others too, from clients
    engine: EngineConfig = field(default_factory=EngineConfig)
    parts: EngineParts = field(default_factory=EngineParts)  # of the engine
    announce_every: float = ANNOUNCE_EVERY  # seconds; also between two looks at the others' records
    lifetime: float = LIFETIME  # of an announcement, in seconds: how long a server that died is still listed
    look_every: float = 1.0  # seconds between two looks at whether this server can go on
    probing: ProbeConfig = field(default_factory=ProbeConfig)
    proofs: float = 2.0  # seconds that other servers have, before this one first chooses its span, to prove that they hold theirs
    drain_timeout: float = 30.0  # seconds for which answers that nobody else can take are still served when it ends
    # Half of the usual times: records are looked up every `announce_every`, so that they spread sooner.
    moving: MovePolicy = field(default_factory=lambda: MovePolicy(pace=10.0, settle=10.0))
    stay_after_failure: float = 600.0  # seconds without a move after one that could not be made
    retry_every: float = 30.0  # seconds until a span that could not be loaded is tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a server offers for as long as it lives, once its settings are settled."""

    offer: Offer
    model_id: str
    blocks: int
    hidden: int  # values of a row
    capacity: int  # blocks
    frames_memory: int  # bytes of frames on their way in and out


def settle_terms(directory: Path, config: ServeConfig) -> ServerSettings:
    """What a server of the model in `directory` offers on this machine, for what the configuration leaves open.

    Raises `CheckpointError`, `UnsupportedModel`, `AdapterError`, and `InvalidSetting` for a device that is not there or a span that the
    memory does not hold.
    """
    device = settled_device(config.device)
    dtype = config.dtype or fast_dtype(device)
    if dtype not in DTYPES:
        raise InvalidSetting("dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
    with Checkpoint(directory) as checkpoint:
        weights = settled_weights(checkpoint, config.weights, "packed" if device == "cpu" else "plain")
        arch = architecture(checkpoint.config)
        takes = footprint(checkpoint, arch, dtype=DTYPES[dtype], weights=weights, cache_tokens=config.engine.cache_tokens)
        adapters, of_adapters = _adapters(config.adapters, arch, DTYPES[dtype])
        takes = replace(takes, block=takes.block + of_adapters)
        digest = checkpoint.digest()
    wire_dtype: WireDtype = config.wire_dtype or dtype  # type: ignore[assignment]
    memory = available(device) if config.memory is None else config.memory
    client_memory = min(config.engine.client_memory, memory // _CLIENTS_PART)
    frames_memory = min(_MOST_FRAMES, memory // _FRAMES_PART)
    offer = Offer(
        directory=directory,
        checkpoint=digest,
        dtype=dtype,
        weights=weights,
        device=device,
        wire_dtype=wire_dtype,
        engine=replace(config.engine, take_adapters=config.take_adapters, client_memory=client_memory),
        parts=config.parts,
        adapters=adapters,
    )
    return ServerSettings(
        offer=offer,
        model_id=model_fingerprint(directory),
        blocks=arch.blocks,
        hidden=arch.hidden,
        capacity=_capacity(takes, memory - client_memory - frames_memory, config),
        frames_memory=frames_memory,
    )


def _adapters(directories: Mapping[str, Path], arch: ModelConfig, dtype: torch.dtype) -> tuple[tuple[OfferedAdapter, ...], int]:
    """Every adapter looked through, and the bytes that one block of all of them takes."""
    if len(directories) > MAX_ADAPTERS:
        raise InvalidSetting("adapters", f"{len(directories)} are given, and a server names at most {MAX_ADAPTERS}")
    offered, size = [], 0
    for name, directory in directories.items():
        if not is_word(name):
            raise InvalidSetting("adapters", f"{name!r} is no name of 1 to 64 letters, digits, dots, dashes and underscores: give NAME=DIR")
        adapter = load_adapter(directory, arch)
        offered.append(OfferedAdapter(name, directory, adapter.digest))
        size += adapter.largest_block * dtype.itemsize
    return tuple(offered), size


def model_fingerprint(directory: Path) -> str:
    """What names a model in the directory: the same for everybody who has the same checkpoint's config."""
    return fingerprint(json_object(directory / "config.json"))


def _capacity(takes: Footprint, memory: int, config: ServeConfig) -> int:
    """Blocks that a span may have in `memory` bytes. What the user asks for is only held against the memory that they named too."""
    if config.span is not None:
        if config.memory is not None:
            takes.check(config.span, memory)
        return len(config.span)
    if config.capacity is not None and config.memory is None:
        return config.capacity
    holds = takes.capacity(memory)
    return holds if config.capacity is None else min(holds, config.capacity)
