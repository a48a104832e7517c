"""The models of a swarm, opened for a gateway: one peer, and over it a way to each model."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from corolla.client.discovery import KnownServers, blocks_of, context_length_of, vocabulary_of
from corolla.client.swarm import SwarmTransport
from corolla.errors import InvalidSetting
from corolla.gateway.model_registry import Models, served_model
from corolla.messages import WireMessage
from corolla.models.checkpoint import json_object
from corolla.swarm.network import Network, OnLost, OnMessage
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.records import fingerprint


@contextmanager
def joined_models(directories: Mapping[str, Path], config: PeerConfig) -> Iterator[Models]:
    """Join a swarm for the models whose config and tokenizer lie in `directories`, by their names, until the block ends.

    Raises `NetworkError` when the swarm cannot be joined, `CheckpointError` for a model whose files are missing.
    """
    described = {name: json_object(directory / "config.json") for name, directory in directories.items()}
    if len({fingerprint(config) for config in described.values()}) < len(described):
        raise InvalidSetting("model", "two of the models are the same one: name each once")
    # A Ctrl-C in a terminal goes to hivemind's processes too, and they are needed until the last answer has ended.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if threading.current_thread() is threading.main_thread() else None
    try:
        peer = SwarmPeer(config)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    with ExitStack() as stack:
        stack.callback(peer.close)
        shared = SharedNetwork(peer.network)
        models = []
        for name, directory in directories.items():
            known = KnownServers(peer, fingerprint(described[name]), blocks_of(described[name]))
            transport = SwarmTransport(shared.part(), known, vocabulary=vocabulary_of(described[name]))
            stack.callback(transport.close)
            stack.callback(known.close)
            known.measure(transport.round_trips, transport.probes)
            models.append(
                served_model(
                    name,
                    directory,
                    transport,
                    "swarm",
                    context_length_of(described[name]),
                    lambda known=known: known.usable,  # type: ignore[misc]
                    round_trips=lambda transport=transport: dict(transport.round_trips.seconds),  # type: ignore[misc]
                    counters=lambda transport=transport: dataclasses.asdict(transport.counters),  # type: ignore[misc]
                    failure=lambda: peer.failure,
                )
            )
        yield Models(models)


class SharedNetwork:
    """One network for several transports: each hears all that comes, and knows its own sessions."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._listeners: list[tuple[OnMessage, OnLost]] = []
        network.listen(self._receive, self._lose)

    def part(self) -> ModelShare:
        """The network as one transport sees it."""
        return ModelShare(self, self._network)

    def add(self, on_message: OnMessage, on_lost: OnLost) -> None:
        self._listeners = [*self._listeners, (on_message, on_lost)]

    def _receive(self, sender: str, message: WireMessage) -> None:
        for on_message, _ in self._listeners:
            on_message(sender, message)

    def _lose(self, peer: str) -> None:
        for _, on_lost in self._listeners:
            on_lost(peer)


class ModelShare:
    """A `Network` that others use too. To close it ends nothing but itself: the peer closes the whole."""

    def __init__(self, shared: SharedNetwork, network: Network) -> None:
        self._shared, self._network = shared, network

    @property
    def me(self) -> str:
        return self._network.me

    @property
    def counts(self) -> Mapping[str, int]:
        return self._network.counts

    def listen(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """See `Network.listen`."""
        self._shared.add(on_message, on_lost)

    def send(self, peer: str, message: WireMessage) -> None:
        """See `Network.send`."""
        self._network.send(peer, message)

    def send_all(self, messages: Sequence[tuple[str, WireMessage]]) -> None:
        """See `Network.send_all`."""
        self._network.send_all(messages)

    def close(self) -> None:
        """See the class."""
