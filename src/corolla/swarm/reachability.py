"""Whether others can dial this peer: it asks some of those that it knows to dial it back.

The connection that a peer asks over says nothing: it goes both ways through any router. So whoever is asked opens one of its own,
to where the asking peer says that it listens, and only at an address that the question itself came from: nobody is sent to dial
others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.multiaddr import Multiaddr

from corolla.swarm.hosts import GREETING

if TYPE_CHECKING:
    from hivemind.dht import DHTNode

MAX_ADDRESSES = 8  # of one question
_TO_DIAL = 3.0  # seconds
_TO_ANSWER = 10.0
_ASKED = 3  # peers
_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


async def ask(node: DHTNode, addresses: Sequence[str]) -> bool | None:
    """Whether others can dial this node at one of its addresses, as most of those that were asked found; None where nobody could tell."""
    known = list(node.protocol.routing_table.peer_id_to_uid)
    asked = random.sample(known, min(len(known), _ASKED))
    request = dht_pb2.StoreRequest(keys=[address.encode() for address in addresses[:MAX_ADDRESSES]])
    answers = await asyncio.gather(*(_ask_one(node, peer, request) for peer in asked))
    found = [any(judged) for judged in answers if judged]
    return 2 * sum(found) >= len(found) if found else None


async def _ask_one(node: DHTNode, peer: PeerID, request: dht_pb2.StoreRequest) -> list[bool]:
    copy = dht_pb2.StoreRequest()
    copy.CopyFrom(request)  # each is signed by itself
    try:
        answer = await node.protocol.get_stub(peer).rpc_dial_back(copy, timeout=_TO_ANSWER)
    except (P2PDaemonError, P2PHandlerError, TimeoutError, OSError):  # it is gone, of an older version, or asked too often
        return []
    return [] if answer is None else list(answer.store_ok)


async def answer(p2p: P2P, caller: PeerID, addresses: Iterable[bytes]) -> list[bool]:
    """Whether a caller can be dialled at each of its addresses that this peer can judge; for the others nothing."""
    seen = {place[0] for found in await p2p.list_peers() if found.peer_id == caller for way in found.addrs if (place := place_of(str(way)))}
    places = dict.fromkeys(place for address in addresses if (place := place_of(address.decode(errors="replace"))))
    verdicts = await asyncio.gather(*(judge(place, seen) for place in places))
    return [verdict for verdict in verdicts if verdict is not None]


async def judge(place: tuple[_Ip, int], seen: Collection[_Ip]) -> bool | None:
    """Whether a peer that is connected from `seen` can be dialled at `place`, an IP address and a TCP port; None where nobody knows."""
    ip, port = place
    if ip in seen:
        return await speaks_libp2p(str(ip), port)
    # Who comes from elsewhere than it listens is behind a router, unless it comes from this same machine, or names a router's address.
    return None if not seen or all(each.is_loopback for each in seen) or ip.is_global else False


def place_of(address: str) -> tuple[_Ip, int] | None:
    """IP address and TCP port of a multiaddr; None for one of another kind."""
    try:
        parts = [(protocol.name, value) for protocol, value in Multiaddr(address).items()]
        if len(parts) < 2 or parts[0][0] not in ("ip4", "ip6") or parts[1][0] != "tcp" or (len(parts) > 2 and parts[2][0] != "p2p"):
            return None
        return ipaddress.ip_address(parts[0][1]), int(parts[1][1])
    except ValueError:
        return None


async def speaks_libp2p(host: str, port: int) -> bool:
    """Whether something at a host and port answers as a libp2p peer does, within a few seconds."""
    writer = None
    try:
        async with asyncio.timeout(_TO_DIAL):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(GREETING)
            return await reader.readexactly(len(GREETING)) == GREETING
    except (OSError, EOFError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()
