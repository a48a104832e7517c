"""hivemind's node, in a process that does not outlive the one that started it, nor its own libp2p daemon.

A server whose process alone is killed, as happens where memory runs out, would else leave its node and libp2p daemon behind:
they would keep its port, its key and every connection of a server that is dead.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import hivemind.dht.node
import psutil
from hivemind import DHT
from hivemind.dht import DHTNode

from corolla.swarm import reachability
from corolla.swarm.bounds import BoundedProtocol
from corolla.swarm.rejoining import STAY_EVERY, Rejoining

_LOOK_EVERY = 0.5  # seconds
_TO_END = 5.0  # seconds that it gets
_TO_ANSWER = 30.0  # seconds for what is asked once, at the start


class Node(DHT):
    """A `hivemind.DHT` whose node is bounded in what it does for others, stays in its swarm, and ends when its parent is gone.

    Args:
        stay_every: seconds between two looks at whether the node is still in its swarm.
        memory: a file of peers that it has met, so that it finds them after a restart.
        settings: of `hivemind.DHT`.
    """

    def __init__(
        self, initial_peers: Sequence[str] = (), *, stay_every: float = STAY_EVERY, memory: Path | None = None, **settings: Any
    ) -> None:
        # What is found is not kept: a record is announced again within seconds, and what strangers want kept is not. Whoever did not
        # answer once is asked again after 5 s, however often that was.
        quiet = {"cache_locally": False, "cache_nearest": 0, "cache_on_store": False, "backoff_rate": 1.0}
        super().__init__(list(initial_peers), **(quiet | settings))
        stay = Rejoining(tuple(initial_peers), every=stay_every, memory=memory)
        self.run_coroutine(partial(_live, stay=stay), return_future=True)

    def run(self) -> None:
        """See `hivemind.DHT.run`; this is the child process."""
        threading.Thread(target=_end_with, args=(os.getppid(),), name="corolla-parent", daemon=True).start()
        hivemind.dht.node.DHTProtocol = BoundedProtocol  # which hivemind makes, and has no other way to be given
        super().run()

    def visible_addresses(self) -> list[str]:
        """The multiaddrs that others reach this node at. Raises `TimeoutError`."""
        return [str(address) for address in self.run_coroutine(_addresses, return_future=True).result(_TO_ANSWER)]

    async def reachable(self, addresses: Sequence[str]) -> bool | None:
        """Whether others can dial this node at one of its addresses; see `reachability.ask`."""
        return await asyncio.wrap_future(self.run_coroutine(partial(_ask, addresses=addresses), return_future=True))

    def end(self) -> None:
        """Shut it down; by force, with its daemon, where it does not end by itself, as a process that was forked into a held lock."""
        self.shutdown()
        self.join(_TO_END)
        if self.is_alive():
            with suppress(psutil.NoSuchProcess):  # it ends just now
                for child in psutil.Process(self.pid).children(recursive=True):
                    child.kill()
            self.kill()
            self.join()


# In the child process.


async def _addresses(_dht: DHT, node: DHTNode) -> list[Any]:
    return await node.get_visible_maddrs()


async def _ask(_dht: DHT, node: DHTNode, addresses: Sequence[str]) -> bool | None:
    return await reachability.ask(node, addresses)


async def _live(_dht: DHT, node: DHTNode, stay: Rejoining) -> None:
    """Stay in the swarm for as long as the daemon lives, and no longer: without it this node answers nobody, and nobody is told."""
    staying = asyncio.create_task(stay.run(node))
    daemon = node.p2p._child
    if daemon is not None:
        await daemon.wait()
        if node.is_alive:
            os._exit(1)
    await staying


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)
