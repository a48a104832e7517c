"""A model that a swarm serves, opened by a client that holds no weights."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from corolla.client.swarm import SwarmTransport
from corolla.errors import CorollaError, NetworkError
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.records import ServerRecord, fingerprint
from corolla.swarm.routing import Route, find_route

_REFRESH = 2.0  # seconds between two looks into the directory
_FIRST_LOOK = 15.0  # seconds for the first servers to appear
_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Joined:
    """An open model: connect over `transport`, to any `peer`."""

    transport: SwarmTransport
    peer: str
    directory: Path
    context_length: int


class KnownServers:
    """What the directory says of one model's servers, looked up again on a thread of its own."""

    def __init__(self, peer: SwarmPeer, model_id: str) -> None:
        self._peer, self._model_id = peer, model_id
        self._records: list[ServerRecord] = []
        self._quality: tuple[str | None, str | None] = None, None
        self._closing = threading.Event()
        self._look()
        deadline = time.monotonic() + _FIRST_LOOK
        while not self._records and time.monotonic() < deadline:
            self._closing.wait(0.5)
            self._look()
        self._thread = threading.Thread(target=self._keep_looking, name="corolla-directory", daemon=True)
        self._thread.start()

    @property
    def records(self) -> list[ServerRecord]:
        return self._records

    def route(self, banned: Collection[str], needed_tokens: int) -> Route:
        """See `client.swarm.FindRoute`."""
        if not self._records:
            raise NetworkError("no server of this swarm serves this model; `corolla status` shows which it serves")
        return find_route(self._records, blocks=self._records[0].blocks, now=time.time(), banned=banned, needed_tokens=needed_tokens)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _look(self) -> None:
        self._records = self._peer.servers(self._model_id)

    def _keep_looking(self) -> None:
        while not self._closing.wait(_REFRESH):
            try:
                self._look()
            except CorollaError:
                continue  # what is known is used until the directory answers again


@contextmanager
def join_swarm(directory: Path, config: PeerConfig) -> Iterator[Joined]:
    """Join a swarm that serves the model whose config and tokenizer lie in `directory`, until the block ends.

    Raises `NetworkError` when the swarm cannot be joined.
    """
    described = json.loads((directory / "config.json").read_bytes())
    peer = SwarmPeer(config)
    try:
        known = KnownServers(peer, fingerprint(described))
        transport = SwarmTransport(peer.network, known.route)
        try:
            yield Joined(transport, "swarm", directory, _context_length(described))
        finally:
            known.close()
            transport.close()
    finally:
        peer.close()


def _context_length(described: dict[str, object]) -> int:
    for key in ("max_position_embeddings", "seq_length", "n_positions"):
        value = described.get(key)
        if isinstance(value, int):
            return value
    return _DEFAULT_CONTEXT
