"""A node of the DHT stays in its swarm: peers that it joined through, and peers that it met, are tried again for as long as it lives.

hivemind's node drops a peer that does not answer from its routing table and never asks it again. So a bootstrap node that was
restarted knew nobody, and nobody came back to it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.multiaddr.exceptions import Error as NoMultiaddr

from corolla.barrier import barrier
from corolla.swarm.dialling import connect
from corolla.swarm.limits import Sparing

if TYPE_CHECKING:
    from hivemind.dht import DHTNode

STAY_EVERY = 10.0  # seconds
_TO_CONNECT = 5.0  # seconds
_MET = 256  # peers whose addresses are remembered
_TRIED = 8  # of them at once, that are not known any more
_FAILURES = 4096  # peers that did not answer, of which hivemind counts
log = logging.getLogger(__name__)
log.addFilter(Sparing())


class Rejoining:
    """What keeps one node in its swarm.

    Args:
        initial_peers: multiaddrs with a peer's id, tried for ever.
        every: seconds between two tries.
        memory: a file for the addresses of peers that it has met; read at the start.
    """

    def __init__(self, initial_peers: Sequence[str], *, every: float, memory: Path | None) -> None:
        self._every, self._memory = every, memory
        self._initial = by_peer(initial_peers)
        self._met = by_peer(_read(memory))  # those met last come last

    async def run(self, node: DHTNode) -> None:
        """Until the node is shut down."""
        first = bool(self._met)
        while node.is_alive:
            if not first:
                await asyncio.sleep(self._every * random.uniform(0.8, 1.2))
            first = False
            with barrier("staying in the swarm"):
                await self._look(node)

    async def _look(self, node: DHTNode) -> None:
        table = node.protocol.routing_table
        gone = [peer for peer in self._met if peer not in table and peer not in self._initial]
        tried = list(self._initial) + random.sample(gone, min(len(gone), _TRIED))
        came_back = await asyncio.gather(*(self._greet(node, peer) for peer in tried))
        if any(came_back):
            await node.find_nearest_nodes([node.node_id])  # whom that peer knows
        await self._remember(node)
        if len(node.blacklist.ban_counter) > _FAILURES:
            node.blacklist.clear()

    async def _greet(self, node: DHTNode, peer: PeerID) -> bool:
        """Ping a peer, by which both know one another; whether this node had not known it."""
        known = peer in node.protocol.routing_table
        if not known:
            # A call alone is made to the addresses that the daemon remembers, which it does for a while only.
            with suppress(P2PDaemonError, OSError, EOFError, TimeoutError):
                async with asyncio.timeout(_TO_CONNECT):
                    await connect(node.p2p, peer, self._initial.get(peer) or self._met[peer])
        answered = await node.protocol.call_ping(peer) is not None
        if answered:
            node.blacklist.register_success(peer)
        return answered and not known

    async def _remember(self, node: DHTNode) -> None:
        """The addresses of the peers that this node knows now."""
        table = node.protocol.routing_table
        before = set(self._met)
        for found in await node.p2p.list_peers():
            if found.peer_id in table and found.addrs:
                self._met.pop(found.peer_id, None)
                self._met[found.peer_id] = list(found.addrs)
        self._met = dict(list(self._met.items())[-_MET:])
        if self._memory is not None and set(self._met) != before:
            _write(self._memory, self._met)


def by_peer(addresses: Iterable[str]) -> dict[PeerID, list[Multiaddr]]:
    """Multiaddrs that end with a peer's id, by peer and without it. What is none is left out."""
    found: dict[PeerID, list[Multiaddr]] = {}
    for text in addresses:
        way, _, name = text.rpartition("/p2p/")
        with suppress(ValueError, NoMultiaddr):
            found.setdefault(PeerID.from_base58(name), []).append(Multiaddr(way))
    return found


def _read(memory: Path | None) -> list[str]:
    if memory is None or not memory.exists():
        return []
    try:
        addresses = json.loads(memory.read_bytes())
    except (OSError, ValueError) as error:
        log.warning("the peers that this node has met cannot be read from %s (%s): it joins without them", memory, error)
        return []
    return [address for address in addresses if isinstance(address, str)][-_MET:] if isinstance(addresses, list) else []


def _write(memory: Path, met: dict[PeerID, list[Multiaddr]]) -> None:
    addresses = [f"{address}/p2p/{peer}" for peer, ways in met.items() for address in ways]
    temporary = memory.with_name(f".{memory.name}.part")
    try:
        temporary.write_text(json.dumps(addresses, indent=0), encoding="utf-8")
        temporary.replace(memory)
    except OSError as error:
        log.warning("the peers that this node has met were not written to %s: %s", memory, error)
