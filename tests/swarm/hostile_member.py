"""Two hostile members of a swarm in a process of their own: they send well-formed messages with odd contents until they are killed.

    python -m tests.swarm.hostile_member ADDRESS CLIENT SEED

CLIENT is the id of an honest one, which they name and write to, too. `fuzz_strategies` says what they send.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from corolla.errors import CallerError, NetworkError
from corolla.messages import Hop, WireMessage
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.records import ServerRecord
from tests.swarm.fuzz_messages import drawn
from tests.swarm.fuzz_strategies import HONEST, HOSTILE, batches

SPANS = {"a": (0, 1), "b": (1, 3), "c": (3, 4)}  # of the swarm's servers
PER_SECOND = 20.0  # messages
DRAWN = 100  # batches; then they begin again


def main() -> None:
    address, client, seed = sys.argv[1:]
    chance = random.Random(seed)
    script = drawn(batches(SPANS, 10), DRAWN, seed)
    members = {name: asyncio.run(_join(address)) for name in HOSTILE}
    for member in members.values():
        member.network.listen(lambda sender, message: None, lambda peer: None)
    ids = {name: member.network.me for name, member in members.items()} | dict.fromkeys(HONEST, client)
    print("ready", flush=True)
    while True:
        for batch in script:
            ids |= _servers(members[HOSTILE[0]].servers(), chance)
            for sender, receiver, message in batch:
                if receiver in ids:
                    _send(members[sender], ids[receiver], renamed(message, ids))
                time.sleep(1 / PER_SECOND)


async def _join(address: str) -> SwarmPeer:
    return SwarmPeer(PeerConfig(initial_peers=[address], client_mode=True))


def _servers(records: list[ServerRecord], chance: random.Random) -> dict[str, str]:
    """A server of each span, as far as there is one."""
    held = {name: [record.peer for record in records if (record.start, record.end) == span] for name, span in SPANS.items()}
    return {name: chance.choice(peers) for name, peers in held.items() if peers}


def _send(member: SwarmPeer, peer: str, message: WireMessage) -> None:
    try:
        member.network.send(peer, message)
    except (CallerError, NetworkError):  # no frame holds it
        return


def renamed(message: WireMessage, ids: Mapping[str, str]) -> WireMessage:
    """The message with the ids of real peers in the places of their names."""
    changes: dict[str, Any] = {}
    for field in ("client", "peer"):
        if (name := getattr(message, field, "")) in ids:
            changes[field] = ids[name]
    if route := getattr(message, "route", ()):
        changes["route"] = tuple(Hop(ids.get(hop.peer, hop.peer), hop.start, hop.end) for hop in route)
    return msgspec.structs.replace(message, **changes)


if __name__ == "__main__":
    main()
