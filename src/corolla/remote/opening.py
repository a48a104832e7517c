"""A model's blocks opened for the PyTorch client: at the servers of a swarm, or in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from corolla.client.discovery import KnownServers
from corolla.engine.engine import Engine, EngineConfig
from corolla.models.checkpoint import json_object
from corolla.models.devices import settled_device
from corolla.models.span import load_span
from corolla.remote.calls import RemoteCalls
from corolla.remote.embedded import EmbeddedNetwork
from corolla.remote.servers import RemoteConfig, Servers
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.records import fingerprint


@dataclass(frozen=True, slots=True)
class OpenBlocks:
    """What computes a model's blocks, until `close`. Closing twice is no error."""

    calls: RemoteCalls
    close: Callable[[], None]


def open_blocks(
    directory: Path,
    blocks: int,
    dtype: torch.dtype,
    *,
    initial_peers: Sequence[str] = (),
    secret: bytes | None = None,
    device: str | None = None,
    config: RemoteConfig | None = None,
) -> OpenBlocks:
    """The blocks of the model whose files lie in `directory`: at the servers of the swarm that `initial_peers` belong to, or,
    where none are named, in this process, in `dtype` on `device` (the CPU by default).

    Raises:
        InvalidSetting: no such device.
        NetworkError: the swarm cannot be joined.
        CheckpointError, UnsupportedModel: as their sentences say.
    """
    with ExitStack() as stack:
        if initial_peers:
            peer = SwarmPeer(PeerConfig(initial_peers=initial_peers, secret=secret, client_mode=True))
            stack.callback(peer.close)
            known = KnownServers(peer, fingerprint(json_object(directory / "config.json")), blocks)
            stack.callback(known.close)
            servers = Servers(peer.network, known, blocks, config=config)
            known.measure(servers.round_trips, servers.probes)
        else:
            whole = load_span(directory, dtype=str(dtype).removeprefix("torch."), device=settled_device(device))
            engine = Engine(whole, EngineConfig())
            network = EmbeddedNetwork(engine)
            servers = Servers(network, network, blocks, config=config)
            engine.start()
        stack.callback(servers.close)
        calls = RemoteCalls(servers)
        stack.callback(calls.close)
        return OpenBlocks(calls, stack.pop_all().close)
