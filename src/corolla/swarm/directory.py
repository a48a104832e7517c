"""Where servers announce themselves and everybody finds them: who holds which blocks of which model.

Two sides implement it: `LocalDirectory` within one process, and `HivemindDirectory` over a swarm's DHT.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from corolla.errors import DeadlineExceeded, InvalidSetting, NetworkError, ServerFault
from corolla.swarm.limits import Sparing
from corolla.swarm.places import INDEX, decode_placed, encode_placed, model_key
from corolla.swarm.records import CLOCKS_DIFFER, LIFETIME, ServerRecord, decode_record, encode_record, is_word

if TYPE_CHECKING:
    from hivemind import DHT

    from corolla.swarm.signatures import SignedEntries

MAX_LIFETIME = LIFETIME + CLOCKS_DIFFER  # seconds; who claims a longer one is not believed, or a server long gone could haunt the swarm
MAX_MODELS = 64  # of one swarm that are looked up
MAX_ENTRIES = 1024  # under one key that are read
_TURN = 64  # of them at once
log = logging.getLogger(__name__)
log.addFilter(Sparing())  # what others announced is logged


class Directory(Protocol):
    """What servers write and clients read."""

    async def publish(self, record: ServerRecord) -> None:
        """Announce a server, in place of what it announced before.

        Raises `InvalidSetting` for a record that no reader would believe, and `NetworkError` when nobody took it.
        """

    async def withdraw(self, peer: str) -> None:
        """Take a server out, at once. One that is not in it is no error. Raises `NetworkError`."""

    async def servers(self, model: str | None = None) -> list[ServerRecord]:
        """The servers of a model (by fingerprint), or of every model, in order of their spans. Raises `NetworkError`."""
        ...

    async def models(self) -> list[str]:
        """The fingerprints of the models that are served now, at most `MAX_MODELS`, those with most servers first.

        Raises `NetworkError`.
        """
        ...


class LocalDirectory:
    """A directory of one process; `clock` gives the unix time, or a virtual one. No record may live for more than `longest` seconds."""

    def __init__(self, clock: Callable[[], float] = time.time, longest: float = MAX_LIFETIME) -> None:
        self._clock, self._longest = clock, longest
        self._records: dict[str, ServerRecord] = {}

    async def publish(self, record: ServerRecord) -> None:
        """See `Directory.publish`."""
        encode_record(record)
        _check_lifetime(record, self._clock(), self._longest)
        self._records[record.peer] = record

    async def withdraw(self, peer: str) -> None:
        """See `Directory.withdraw`."""
        self._records.pop(peer, None)

    async def servers(self, model: str | None = None) -> list[ServerRecord]:
        """See `Directory.servers`."""
        now = self._clock()
        return _in_order(record for record in self._records.values() if record.expires > now and model in (None, record.model))

    async def models(self) -> list[str]:
        """See `Directory.models`."""
        return _most_served(record.model for record in await self.servers())


# What stands in the DHT: under the key of a model one entry for each of its servers, and under one key of the whole swarm an
# entry for each server with its model's name. A server is its public key, so it has one entry under a key and nobody else's.


class _Announced(msgspec.Struct, frozen=True, tag="server"):
    record: bytes


class _Serves(msgspec.Struct, frozen=True, tag="serves"):
    model: str
    expires: float


class _Withdrawn(msgspec.Struct, frozen=True, tag="withdrawn"):
    """Stands where a record stood. It expires later than the record did, for a DHT keeps what expires last."""


_Entry = _Announced | _Serves | _Withdrawn
_entry_decoder: msgspec.msgpack.Decoder[_Entry] = msgspec.msgpack.Decoder(_Entry)


_WITHDRAWAL = 5.0  # seconds that a withdrawal stands at least, for clocks that do not quite agree


@dataclass(frozen=True, slots=True, kw_only=True)
class HivemindDirectoryConfig:
    deadline: float = 10.0  # seconds for each operation
    longest: float = MAX_LIFETIME  # seconds that a record may live, or it is not believed


class HivemindDirectory:
    """A directory in hivemind's DHT, for one event loop. The DHT keeps running when the directory is not used any more.

    `entries` signs what this server publishes and checks what others did; it carries the swarm's secret. Give it to the DHT
    too when that is made, so that the node never holds anything unchecked; here it is only made sure of.
    """

    def __init__(self, dht: DHT, entries: SignedEntries, config: HivemindDirectoryConfig | None = None) -> None:
        self._dht = dht
        self._identity = entries.identity
        self._config = config or HivemindDirectoryConfig()
        self._model: str | None = None  # published by this server and not withdrawn
        self._stored_until: dict[str, float] = {}  # by key: when what this server stored there last expires
        self._silent_since: float | None = None  # on the monotonic clock, while nothing is answered
        self._writing = asyncio.Lock()  # a withdrawal must not be overtaken by the announcement before it
        self._check_alive()  # or the next line would wait for ever
        dht.add_validators([entries])

    @property
    def silent_for(self) -> float:
        """Seconds for which the DHT's process has answered nothing that it was asked; for any thread."""
        since = self._silent_since
        return 0.0 if since is None else time.monotonic() - since

    async def publish(self, record: ServerRecord) -> None:
        """See `Directory.publish`. Raises `InvalidSetting` for another peer's record, too."""
        encoded = encode_record(record)
        _check_lifetime(record, time.time(), self._config.longest)
        self._check_ours(record.peer)
        async with self._writing:
            if self._model not in (None, record.model):
                await self._withdraw()
            self._model = record.model
            announced: dict[str, _Entry] = {
                model_key(record.model): _Announced(encoded),
                INDEX: _Serves(record.model, record.expires),
            }
            await self._store(announced, until=record.expires)

    async def withdraw(self, peer: str) -> None:
        """See `Directory.withdraw`. Raises `InvalidSetting` for another peer."""
        self._check_ours(peer)
        async with self._writing:
            await self._withdraw()

    async def servers(self, model: str | None = None) -> list[ServerRecord]:
        """See `Directory.servers`."""
        models = await self.models() if model is None else [model]
        found = await asyncio.gather(*(self._servers(each) for each in models))
        return _in_order(record for records in found for record in records)

    async def models(self) -> list[str]:
        """See `Directory.models`."""
        now = time.time()
        entries = (entry for _, entry in await self._entries(INDEX))
        served = (entry for entry in entries if isinstance(entry, _Serves) and _lives(entry.expires, now, self._config.longest))
        return _most_served(entry.model for entry in served if is_word(entry.model))

    async def _withdraw(self) -> None:
        if self._model is not None:
            gone: dict[str, _Entry] = {model_key(self._model): _Withdrawn(), INDEX: _Withdrawn()}
            await self._store(gone, until=time.time() + _WITHDRAWAL)
            self._model = None

    async def _servers(self, model: str) -> list[ServerRecord]:
        now = time.time()
        records = []
        for peer, entry in await self._entries(model_key(model)):
            if not isinstance(entry, _Announced):
                continue
            try:
                record = decode_record(entry.record)
            except ServerFault as fault:
                log.warning("peer %s: %s", peer, fault)
                continue
            if record.peer != peer or record.model != model:
                log.warning(
                    "peer %s announced peer %s with model %s among the servers of %s: ignored", peer, record.peer, record.model, model
                )
            elif _lives(record.expires, now, self._config.longest):
                records.append(record)
        return records

    async def _entries(self, key: str) -> list[tuple[str, _Entry]]:
        """What stands under a key, by the peer that wrote it."""
        from corolla.swarm.signatures import peer_of

        entries: list[tuple[str, _Entry]] = []
        standing = list((await self._standing(key)).items())
        for number, (public_key, (stored, _)) in enumerate(random.sample(standing, min(len(standing), MAX_ENTRIES))):
            if number % _TURN == _TURN - 1:
                await asyncio.sleep(0)  # messages go out and come in meanwhile
            try:
                entries.append((peer_of(public_key), _entry_decoder.decode(decode_placed(stored).entry)))
            except (ServerFault, msgspec.DecodeError) as fault:  # also an entry of a later version
                log.warning("a directory entry cannot be read: %s", fault)
        return entries

    async def _standing(self, key: str) -> dict[bytes, tuple[bytes, float]]:
        """What stands under a key, by public key: the entry, and when the DHT drops it."""
        # `latest` asks all nodes that should know: a withdrawal must not hide behind a copy in a cache.
        found = await self._within_deadline("looking up servers", lambda: [self._dht.get(key, latest=True, return_future=True)])
        if found[0] is None:
            return {}
        return {public_key: (stored.value, stored.expiration_time) for public_key, stored in found[0].value.items()}

    async def _store(self, entries: dict[str, _Entry], until: float) -> None:
        """Store entries until then, or until just after what stands there: a DHT keeps what expires last."""
        assert self._identity is not None
        subkey = self._identity.public_key
        times = {}
        for key in entries:
            if key not in self._stored_until:  # an earlier life of this server may have left something
                _, self._stored_until[key] = (await self._standing(key)).get(subkey, (b"", 0.0))
            times[key] = self._stored_until[key] = max(until, self._stored_until[key] + 0.001)
        stored = await self._within_deadline(
            "announcing this server",
            lambda: [
                self._dht.store(key, encode_placed(key, msgspec.msgpack.encode(entry)), times[key], subkey=subkey, return_future=True)
                for key, entry in entries.items()
            ],
        )
        if not all(stored):
            for key in entries:  # as when a clock went ahead for a while: what stands there now is looked up again
                del self._stored_until[key]
            raise NetworkError("the swarm refused this server's record: do the clocks agree, and is the secret the swarm's?")

    async def _within_deadline(self, what: str, start: Callable[[], list[Future[Any]]]) -> list[Any]:
        self._check_alive()
        began, answered = time.monotonic(), False
        try:
            async with asyncio.timeout(self._config.deadline):
                found = await asyncio.gather(*(asyncio.wrap_future(future) for future in start()))
            answered = True
            return found
        except TimeoutError as error:
            raise DeadlineExceeded(f"{what}: the swarm's DHT did not answer within {self._config.deadline:g} s") from error
        finally:  # after an error that nobody expects too: without torch's manager of shared memory nothing can be asked any more
            self._silent_since = None if answered else self._silent_since or began

    def _check_alive(self) -> None:
        if not self._dht.is_alive():
            raise NetworkError("the DHT process of this machine has ended: start again")

    def _check_ours(self, peer: str) -> None:
        if self._identity is None:
            raise InvalidSetting("identity", "there is none to sign a record with; this directory can only be read")
        if peer != self._identity.peer:
            raise InvalidSetting("peer", f"{peer} is not this server, which is {self._identity.peer}; a server announces itself only")


def _check_lifetime(record: ServerRecord, now: float, longest: float) -> None:
    if not _lives(record.expires, now, longest):
        raise InvalidSetting("expires", f"{record.expires - now:.0f} s from now is not within the next {longest:g} s")


def _lives(expires: float, now: float, longest: float) -> bool:
    return now < expires <= now + longest


def _most_served(models: Iterable[str]) -> list[str]:
    counts = Counter(models)
    return sorted(counts, key=lambda model: (-counts[model], model))[:MAX_MODELS]


def _in_order(records: Iterable[ServerRecord]) -> list[ServerRecord]:
    return sorted(records, key=lambda record: (record.model, record.start, record.end, record.peer))
