"""A peer of a swarm within one process: a `server.announcing.Peer` over the local network and directory."""

from __future__ import annotations

import asyncio
import threading

from corolla.errors import NetworkError
from corolla.messages import Array, ForwardFrame, ResultFrame, WireMessage
from corolla.swarm.directory import LocalDirectory
from corolla.swarm.network import LocalHub, LocalNetwork
from corolla.swarm.records import ServerRecord


def answer_probe(network: LocalNetwork, sender: str, message: WireMessage) -> None:
    """A server that is nothing but an answer to probes."""
    if isinstance(message, ForwardFrame):
        network.send(sender, ResultFrame(message.call, Array("float32", message.hidden.shape, memoryview(bytes(message.hidden.nbytes)))))


class LocalPeer:
    """`published` is every record in order; while `cut_off`, the directory does not answer, and `error` is
    what it raises; from when it `hangs` until that is set it keeps who asks."""

    def __init__(self, hub: LocalHub, directory: LocalDirectory, name: str) -> None:
        self.network = hub.join(name)
        self.addresses = [f"/local/{name}", "x" * 1000]
        self.published: list[ServerRecord] = []
        self.withdrawn = self.closed = self.cut_off = False
        self.failure: str | None = None
        self.reachable: bool | None = None
        self.error: Exception | None = None
        self.hangs: threading.Event | None = None
        self._directory = directory

    def servers(self, model: str | None = None) -> list[ServerRecord]:
        self._check()
        return asyncio.run(self._directory.servers(model))

    def publish(self, record: ServerRecord) -> None:
        self._check()
        self.published.append(record)
        asyncio.run(self._directory.publish(record))

    def withdraw(self) -> None:
        self._check()
        self.withdrawn = True
        asyncio.run(self._directory.withdraw(self.network.me))

    def close(self) -> None:
        self.closed = True
        self.network.close()

    def _check(self) -> None:
        if self.cut_off:
            raise NetworkError("cut off")
        if self.error is not None:
            raise self.error
        if self.hangs is not None:
            self.hangs.wait()
