"""A model that a swarm serves, opened by a client that holds no weights."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from corolla.barrier import barrier
from corolla.client.swarm import SwarmTransport
from corolla.errors import AdapterError, CorollaError, NetworkError, NoRoute, UnsupportedModel
from corolla.models.checkpoint import json_object
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.pings import RoundTrips
from corolla.swarm.probing import Probes
from corolla.swarm.records import ServerRecord, fingerprint
from corolla.swarm.routing import Quality, Route, WantedAdapter, find_route, quality, seconds_along

_REFRESH = 2.0  # seconds between two looks into the directory
_FIRST_LOOK = 15.0  # seconds for the first servers to appear
_DEFAULT_CONTEXT = 2048
_WORTH_MOVING = 2.0  # times quicker than the route that a session has: its whole history is computed again
_SHORT_DIGEST = 8  # hexadecimal digits at least
_MEASURED = 16  # servers whose round trips are measured
_STRANGERS = 128  # servers that have proven nothing yet, of which routes are looked for at most


@dataclass(frozen=True, slots=True)
class Joined:
    """An open model: connect over `transport`, to any `peer`."""

    transport: SwarmTransport
    peer: str
    directory: Path
    context_length: int
    known: KnownServers
    cache_tokens: None = None  # of all sessions together: the servers' own matter
    sessions: int = 32  # at once, for the most tokens a second: a forward takes little longer for as many rows

    def adapter(self, name: str) -> str:
        """The digest of the adapter that servers hold under this name, or whose digest begins with it. Raises `AdapterError`."""
        return adapter_named(name, self.known.proven or self.known.records)


class Listing(Protocol):
    """Where servers are looked up; see `swarm.peer.SwarmPeer`."""

    def servers(self, model: str | None = None) -> list[ServerRecord]: ...


class KnownServers:
    """What the directory says of one model's servers, looked up again on a thread of its own: the `Router` of a client. Records that
    do not have the model's `blocks` are not believed."""

    def __init__(self, peer: Listing, model_id: str, blocks: int, look_every: float = _REFRESH) -> None:
        self._peer, self._model_id, self._blocks, self._look_every = peer, model_id, blocks, look_every
        self._records: list[ServerRecord] = []
        self._heard_of = False  # any server, ever
        self._round_trips: RoundTrips | None = None
        self._probes: Probes | None = None
        self._chance = random.Random()
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

    @property
    def proven(self) -> list[ServerRecord]:
        """Those of the records whose servers this client has seen at work."""
        return [] if self._probes is None else self._probes.proven(self._records)

    @property
    def usable(self) -> list[ServerRecord]:
        """The records without those of servers that were asked and did not compute: by these a swarm is ready, or not."""
        if self._probes is None:
            return self._records
        return [record for record in self._records if self._probes.verdict(record) not in ("failing", "silent")]

    def measure(self, round_trips: RoundTrips, probes: Probes | None = None) -> None:
        """From now on measure this client's round trips too, to those servers that its tokens go to and come from; and let servers prove
        that they compute what they claim, before routes go over them."""
        self._round_trips, self._probes = round_trips, probes
        if probes is not None:
            probes.ask(self._records)

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None, adapter: WantedAdapter | None = None) -> Route:
        """See `client.swarm.Router`."""
        return self._route(self._records, avoid, needed_tokens, like, adapter)

    def quicker(self, route: Route, avoid: Collection[str], needed_tokens: int, adapter: WantedAdapter | None = None) -> Route | None:
        """See `client.swarm.Router`. Load is left out: the session itself is part of it, and would flee from its own shadow."""
        same = [record for record in self._records if route.quality in (None, quality(record))]
        idle = [msgspec.structs.replace(record, active=0) for record in same]
        try:
            best = self._route(idle, avoid, needed_tokens, route.quality, adapter)
        except (NoRoute, NetworkError):
            return None
        seconds = seconds_along(idle, route, blocks=self._blocks, prefer=self._prefer)
        return best if seconds is not None and best.seconds * _WORTH_MOVING < seconds else None

    def _route(
        self,
        records: list[ServerRecord],
        avoid: Collection[str],
        needed_tokens: int,
        like: Quality | None,
        adapter: WantedAdapter | None,
    ) -> Route:
        proven = None
        if self._probes is not None:
            known = self._probes.proven(records)
            proven = {record.peer for record in known}
            strangers = [record for record in records if record.peer not in proven]
            records = known + self._chance.sample(strangers, min(len(strangers), _STRANGERS))
        if not self._heard_of:
            raise NetworkError("no server of this swarm serves this model; `corolla status` shows which it serves")
        return find_route(
            records,
            blocks=self._blocks,
            now=time.time(),
            banned=avoid,
            needed_tokens=needed_tokens,
            prefer=self._prefer,
            like=like,
            adapter=adapter,
            proven=proven,
        )

    @property
    def _prefer(self) -> Mapping[str, float] | None:
        return None if self._round_trips is None else self._round_trips.seconds or None

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _look(self) -> None:
        self._records = [record for record in self._peer.servers(self._model_id) if record.blocks == self._blocks]
        self._heard_of |= bool(self._records)
        if self._round_trips is not None:
            ends = [record.peer for record in self._records if record.embeds or record.heads]
            self._round_trips.ask(ends[:_MEASURED])
        if self._probes is not None:
            self._probes.ask(self._records)

    def _keep_looking(self) -> None:
        while not self._closing.wait(self._look_every):
            with barrier("the directory watch"), suppress(CorollaError):  # what is known is used until the directory answers again
                self._look()


@contextmanager
def join_swarm(directory: Path, config: PeerConfig, *, timed: bool = False) -> Iterator[Joined]:
    """Join a swarm that serves the model whose config and tokenizer lie in `directory`, until the block ends.

    `timed` asks for the timings of each token.

    Raises `NetworkError` when the swarm cannot be joined, `UnsupportedModel` for a config.json that does not say how many blocks there are.
    """
    described = json_object(directory / "config.json")
    peer = SwarmPeer(config)
    try:
        known = KnownServers(peer, fingerprint(described), blocks_of(described))
        transport = SwarmTransport(peer.network, known, vocabulary=vocabulary_of(described), timed=timed)
        known.measure(transport.round_trips, transport.probes)
        try:
            yield Joined(transport, "swarm", directory, context_length_of(described), known)
        finally:
            known.close()
            transport.close()
    finally:
        peer.close()


def adapter_named(name: str, records: Collection[ServerRecord]) -> str:
    """The digest of the adapter that the servers hold under this name, or whose digest begins with it (of at least 8 digits).

    Raises `AdapterError` when there is none, or several.
    """
    held = {(known, digest) for record in records for known, digest in record.adapters.items()}
    found = {digest for known, digest in held if known == name or (len(name) >= _SHORT_DIGEST and digest.startswith(name))}
    if len(found) > 1:
        which = ", ".join(sorted(digest[:12] for digest in found))
        raise AdapterError(f"{name!r} names several adapters of this swarm: give the beginning of one's digest, of {which}")
    if not found:
        names = ", ".join(sorted({known for known, _ in held})) or "none"
        raise AdapterError(f"no server of this model has an adapter {name!r}, and there is no such directory; they have: {names}")
    return found.pop()


def vocabulary_of(described: dict[str, object]) -> int | None:
    """How many tokens a config.json says that its model knows."""
    value = described.get("vocab_size")
    return value if isinstance(value, int) else None


def blocks_of(described: dict[str, object]) -> int:
    """How many blocks a config.json says that its model has. Raises `UnsupportedModel` where it does not say."""
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        value = described.get(key)
        if isinstance(value, int):
            return value
    raise UnsupportedModel("config.json does not say how many blocks the model has: num_hidden_layers is missing")


def context_length_of(described: dict[str, object]) -> int:
    """How many tokens its sessions hold."""
    for key in ("max_position_embeddings", "seq_length", "n_positions"):
        value = described.get(key)
        if isinstance(value, int):
            return value
    return _DEFAULT_CONTEXT
