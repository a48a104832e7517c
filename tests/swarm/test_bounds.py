"""What a node of the DHT does for strangers: what it keeps, of whom, and how often it answers."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from corolla.swarm.places import INDEX, encode_placed
from tests.swarm.harness import OVER_HIVEMIND

# hivemind scripts a function as it is imported, which torch 2.13 calls deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from hivemind.dht import DHTNode
    from hivemind.dht.routing import DHTID, RoutingTable
    from hivemind.dht.validation import DHTRecord
    from hivemind.p2p import P2PHandlerError, PeerID
    from hivemind.proto import dht_pb2
    from hivemind.utils import MSGPackSerializer

    from corolla.swarm import bounds
    from corolla.swarm.bounds import BoundedProtocol, BoundedStorage
    from corolla.swarm.peer import PeerConfig, SwarmPeer
    from corolla.swarm.signatures import Identity, SignedEntries

KEY = DHTID.generate(INDEX)
pytestmark = OVER_HIVEMIND


def in_seconds(seconds: float) -> float:
    return time.time() + seconds


# What is kept, without a network.


def test_an_entry_lives_no_longer_than_a_record_may() -> None:
    storage = BoundedStorage()
    for seconds in (-1.0, bounds.STANDS + 1, float("inf")):
        assert not storage.store_subkey(KEY, b"writer", b"entry", in_seconds(seconds))
    assert storage.store_subkey(KEY, b"writer", b"entry", in_seconds(bounds.STANDS - 1))


def test_an_older_entry_sent_again_does_not_end_the_newer_one() -> None:
    storage = BoundedStorage()
    later, sooner = in_seconds(15), in_seconds(0.2)
    assert storage.store(KEY, b"newer", later, subkey=b"writer")
    assert not storage.store(KEY, b"older", sooner, subkey=b"writer")
    while time.time() <= sooner:
        time.sleep(0.02)
    assert storage.get(KEY).value.get(b"writer").value == b"newer"


def test_a_plain_value_is_not_kept() -> None:
    assert not BoundedStorage().store(KEY, b"value", in_seconds(10))


def test_a_writer_has_few_entries_and_renews_them() -> None:
    storage = BoundedStorage()
    keys = [DHTID.generate(f"model {number}") for number in range(bounds.ENTRIES_EACH + 1)]
    assert [storage.store_subkey(key, b"writer", b"entry", in_seconds(10)) for key in keys] == [True] * bounds.ENTRIES_EACH + [False]
    assert storage.store_subkey(keys[0], b"writer", b"again", in_seconds(20))
    assert storage.store_subkey(keys[-1], b"another", b"entry", in_seconds(10))


def test_all_entries_together_take_bounded_memory() -> None:
    storage, entry = BoundedStorage(), bytes(16_000)
    stored = sum(storage.store_subkey(KEY, b"writer %d" % number, entry, in_seconds(10)) for number in range(2000))
    assert 0 < stored < 2000
    assert storage.size <= bounds.BYTES
    assert storage.store_subkey(KEY, b"writer 0", entry, in_seconds(20))  # those that are there go on


# Whom a node knows, without a network.


def knowing(node_id: DHTID) -> BoundedProtocol:
    protocol = BoundedProtocol(_initialized_with_create=True)
    protocol.node_id, protocol.routing_table = node_id, RoutingTable(node_id, 20, 5)
    return protocol


def test_a_peer_is_one_node_whatever_ids_it_makes_up() -> None:
    protocol, peer, other = knowing(DHTID(1)), PeerID(b"peer"), PeerID(b"other")

    async def scenario() -> None:
        await protocol.update_routing_table(DHTID(99), other)
        for number in range(1000):
            await protocol.update_routing_table(DHTID(1000 + number), peer)
        await protocol.update_routing_table(DHTID(99), peer)  # another's

    asyncio.run(scenario())
    assert protocol.routing_table.uid_to_peer_id == {DHTID(99): other, DHTID(1999): peer}


def test_a_peer_that_does_not_answer_is_forgotten() -> None:
    protocol, peer = knowing(DHTID(1)), PeerID(b"peer")

    async def scenario() -> None:
        await protocol.update_routing_table(DHTID(99), peer)
        await protocol.update_routing_table(None, peer, responded=False)
        await protocol.update_routing_table(None, PeerID(b"unknown"), responded=False)

    asyncio.run(scenario())
    assert not protocol.routing_table.uid_to_peer_id


# Over real nodes: one honest peer, and a node of hivemind's own that says what it likes.


@pytest.fixture(scope="module")
def honest() -> Iterator[SwarmPeer]:
    async def join() -> SwarmPeer:  # while an event loop runs, or hivemind makes one and leaves it
        return SwarmPeer(PeerConfig())

    peer = asyncio.run(join())
    yield peer
    peer.close()


class Stranger:
    """A node with an identity: `async with Stranger(...)`."""

    def __init__(self, identity: Path, honest: SwarmPeer) -> None:
        self.entries = SignedEntries(Identity.load(identity))
        self._path, self._honest = identity, honest
        self.target = PeerID.from_base58(honest.network.me)

    async def __aenter__(self) -> Stranger:
        self.node = await DHTNode.create(
            initial_peers=self._honest.addresses,
            identity_path=str(self._path),
            check_if_identity_free=False,
            record_validator=self.entries,
            client_mode=True,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.node.shutdown()

    async def store(self, keys: list[str], *, entries: SignedEntries | None = None, cached: bool = False) -> list[bool] | None:
        """Entries of one's own, or of `entries`' identity, under keys, as they say."""
        by = entries or self.entries
        assert by.identity is not None
        expires = in_seconds(15)
        values = []
        for key in keys:
            value = MSGPackSerializer.dumps(encode_placed(key, b"this"))
            subkey = MSGPackSerializer.dumps(by.identity.public_key)
            values.append(by.sign_value(DHTRecord(DHTID.generate(key).to_bytes(), subkey, value, expires)))
        subkeys = [by.identity.public_key] * len(keys)
        return await self.node.protocol.call_store(
            self.target, [DHTID.generate(key) for key in keys], values, [expires] * len(keys), subkeys, in_cache=cached
        )

    async def ask(self, keys: list[bytes]) -> dht_pb2.FindResponse:
        request = dht_pb2.FindRequest(keys=keys)
        return await self.node.protocol.get_stub(self.target).rpc_find(request, timeout=30)


def test_a_node_keeps_its_callers_own_entries_under_known_keys(honest: SwarmPeer, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Stranger(tmp_path / "key", honest) as stranger:
            assert await stranger.store([INDEX, "corolla/2/model/abc", "anything"]) == [True, True, False]
            another = SignedEntries(Identity.load(tmp_path / "another"))
            assert await stranger.store([INDEX], entries=another) == [False]
            assert await stranger.store(["corolla/2/model/def"], cached=True) == [False]

    asyncio.run(scenario())


def test_a_long_question_is_refused_and_the_others_are_answered(honest: SwarmPeer, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Stranger(tmp_path / "key", honest) as stranger, Stranger(tmp_path / "other", honest) as other:
            keys = [number.to_bytes(20, "big") for number in range(60_000)]
            for bad in (keys, keys[: bounds.MAX_KEYS + 1], [keys[0], keys[0]], [b"short"]):
                with pytest.raises(P2PHandlerError, match="ProtocolError"):
                    await stranger.ask(bad)
            assert len((await stranger.ask(keys[: bounds.MAX_KEYS])).results) == bounds.MAX_KEYS
            asked = (stranger.ask(keys[: bounds.MAX_KEYS]) for _ in range(20))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert any("too much at once" in str(answer) for answer in answers)
            assert len((await other.ask(keys[:1])).results) == 1

    asyncio.run(scenario())
