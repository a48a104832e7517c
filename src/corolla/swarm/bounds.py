"""What a node of the DHT does for others, bounded: what it stores, how much of it, for how long, and how often it is asked.

hivemind stores whatever validates, under any key, until any time, and answers a question of any length. Here an entry is taken
only from the peer that wrote it, which libp2p has proved, and a caller has a rate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import get_dht_time

from corolla.errors import CapacityError, ProtocolError
from corolla.swarm import reachability
from corolla.swarm.limits import Rate
from corolla.swarm.records import CLOCKS_DIFFER, LIFETIME, MAX_ADDRESS
from corolla.swarm.signatures import peer_of

MAX_KEYS = 64  # of one question, or entries of one call that stores
ENTRIES = 4096  # of all writers, on one node
ENTRIES_EACH = 8  # of one writer: a server has two, and two more in each model that it left just now
BYTES = 8 * 2**20  # of all entries, with `_OVERHEAD` for each
_OVERHEAD = 1024  # bytes of an entry beside its own
STANDS = LIFETIME + 2 * CLOCKS_DIFFER  # seconds that an entry may have left: a record, a withdrawal after it, a clock that is ahead
NODES = 2048  # that a node knows
_RATE = 100.0  # keys and entries a second, of one caller
_BURST = 400.0
_CALLERS = 2048  # whose rates are remembered
_ID_BYTES = DHTID.HASH_NBYTES


class BoundedStorage(DHTLocalStorage):
    """Entries of writers under keys; nothing else. What is older than what stands changes nothing."""

    def store(self, key: DHTID, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        """See `DHTLocalStorage.store`; a plain value is refused."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """See `DHTLocalStorage.store_subkey`; `subkey` is the writer's public key."""
        now = get_dht_time()
        if not now < expiration_time <= now + STANDS:
            return False
        standing = self.get(key)
        before = standing.value.get(subkey) if standing is not None else None
        # hivemind refuses an older entry too, but drops the newer one when the older one would have expired.
        if before is not None and before.expiration_time >= expiration_time:
            return False
        if not self._has_room(subkey, len(value) - (len(before.value) if before is not None else 0), new=before is None):
            return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))

    def _has_room(self, writer: bytes, growth: int, *, new: bool) -> bool:
        if new:
            entries = list(self._entries())
            if len(entries) >= ENTRIES or sum(other == writer for other, _ in entries) >= ENTRIES_EACH:
                return False
            growth += len(writer) + _OVERHEAD
        return growth <= 0 or self.size + growth <= BYTES

    @property
    def size(self) -> int:
        """Bytes of memory that the entries take, about."""
        return sum(len(writer) + size + _OVERHEAD for writer, size in self._entries())

    def _entries(self) -> Iterator[tuple[bytes, int]]:
        """Each entry's writer and bytes."""
        for _, item in self.items():
            for writer, entry in item.value.items():
                yield writer, len(entry.value)


class BoundedProtocol(DHTProtocol):
    """hivemind's protocol under the same names, for strangers; and one call more, `rpc_dial_back`."""

    _rpc_handlers = _stub_type = None  # of this class, in place of its parent's

    async def add_p2p_handlers(self, p2p: P2P, wrapper: Any = None, **settings: Any) -> None:
        """See `ServicerBase.add_p2p_handlers`. It is called once what is stored in has been made, and before anybody calls."""
        self.storage = BoundedStorage()
        self._rates: OrderedDict[PeerID, Rate] = OrderedDict()
        await super().add_p2p_handlers(p2p, _Gate(self, self if wrapper is None else wrapper), **settings)

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        return str(DHTProtocol._get_handle_name(namespace, method_name))

    def charge(self, caller: PeerID, cost: int) -> None:
        """Count what a caller asks for. Raises `CapacityError` for one that asks for too much."""
        rate = self._rates.pop(caller, None) or Rate(_RATE, burst=_BURST)
        self._rates[caller] = rate
        if len(self._rates) > _CALLERS:
            self._rates.popitem(last=False)
        if wait := rate.take(cost):
            raise CapacityError("you ask this node for too much at once", retry_after=wait)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """See `DHTProtocol.rpc_store`: entries of the caller's own are stored, one by one."""
        await self.rpc_ping(dht_pb2.PingRequest(peer=request.peer), context)
        caller = context.remote_id.to_base58()
        stored = [
            not cached and self._store(caller, *entry)
            for *entry, cached in zip(request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache, strict=True)
        ]
        return dht_pb2.StoreResponse(store_ok=stored, peer=self.node_info)

    def _store(self, caller: str, key: bytes, tag: bytes, value: bytes, expires: float) -> bool:
        if tag in self.RESERVED_SUBKEYS or not self._validate_record(key, tag, value, expires):
            return False
        public_key = self.serializer.loads(tag)
        return peer_of(public_key) == caller and self.storage.store_subkey(DHTID.from_bytes(key), public_key, value, expires)

    async def rpc_dial_back(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Dial the caller at its own addresses, the keys of the request; see `reachability`."""
        return dht_pb2.StoreResponse(store_ok=await reachability.answer(self.p2p, context.remote_id, request.keys))

    async def call_find(self, peer: PeerID, keys: Any) -> Any:
        """See `DHTProtocol.call_find`: of the nodes that an answer names, no more are taken than an honest one names."""
        found = await super().call_find(peer, keys)
        if not found:
            return found
        return {key: (value, dict(list(nearest.items())[: self.bucket_size])) for key, (value, nearest) in found.items()}

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """See `DHTProtocol.update_routing_table`.

        A peer is one node: after a restart its new id takes the old one's place, and ids that it makes up take nobody's. What is
        stored here is not handed on to a new node: its writers bring it within seconds.
        """
        table = self.routing_table
        known = table.get(peer_id=peer_id)
        if not responded:
            if known is not None:
                del table[known]
            return
        if node_id is None or node_id == self.node_id or table.get(node_id=node_id, default=peer_id) != peer_id:
            return
        if known not in (None, node_id):
            del table[known]
        if node_id not in table and len(table.uid_to_peer_id) >= NODES:
            return
        to_ping = table.add_or_update_node(node_id, peer_id)
        if to_ping is not None:
            await self.call_ping(to_ping[1])

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Leave out what is not valid, in place of all that came with it."""
        with dictionary.freeze():
            for subkey, (value, expires) in list(dictionary.items()):
                if not self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expires):
                    del dictionary[subkey]
        return True


class _Gate:
    """What callers reach in place of the protocol: calls of another size, or too many, go no further."""

    def __init__(self, protocol: BoundedProtocol, inner: Any) -> None:
        self._protocol, self._inner = protocol, inner

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        self._enter(request, context, 1)
        return await self._inner.rpc_ping(request, context)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        self._enter(request, context, len(request.keys))
        return await self._inner.rpc_store(request, context)

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        self._enter(request, context, len(request.keys))
        if len(set(request.keys)) < len(request.keys):
            raise ProtocolError("a question names a key twice")
        return await self._inner.rpc_find(request, context)

    async def rpc_dial_back(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        if len(request.keys) > reachability.MAX_ADDRESSES or any(len(address) > MAX_ADDRESS for address in request.keys):
            raise ProtocolError("a call names more or longer addresses than a peer has")
        self._protocol.charge(context.remote_id, int(_RATE))
        return await self._inner.rpc_dial_back(request, context)

    def _enter(self, request: Any, context: P2PContext, keys: int) -> None:
        if keys > MAX_KEYS:
            raise ProtocolError(f"a call names {keys} keys, at most {MAX_KEYS} are looked at")
        if len(request.peer.node_id) not in (0, _ID_BYTES) or any(len(key) != _ID_BYTES for key in getattr(request, "keys", ())):
            raise ProtocolError("a call names a node or a key of another length")
        self._protocol.charge(context.remote_id, max(1, keys))
