from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from corolla.errors import InvalidSetting, NetworkError
from corolla.swarm.directory import MAX_LIFETIME, HivemindDirectory, HivemindDirectoryConfig, LocalDirectory
from corolla.swarm.places import INDEX, encode_placed, model_key
from corolla.swarm.records import ServerRecord

# hivemind scripts a function as it is imported, which torch 2.13 calls deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import hivemind
    from hivemind.dht.routing import DHTID
    from hivemind.dht.validation import DHTRecord

    from corolla.swarm.signatures import MAX_ENTRY_BYTES, Identity, SignedEntries

SECRET = b"correct horse battery staple"
LONGEST = 3600.0  # seconds that records may live here: a slow machine must not make them expire


def record(peer: str = "QmA", **fields: Any) -> ServerRecord:
    given: dict[str, Any] = {
        "peer": peer,
        "name": "",
        "model": "0123456789abcdef",
        "checkpoint": "fedcba9876543210",
        "start": 0,
        "end": 4,
        "blocks": 8,
        "hidden": 64,
        "dtype": "float32",
        "weights": "plain",
        "throughput": 1000.0,
        "free_tokens": 1024,
        "active": 0,
        "round_trips": {},
        "addresses": (),
        "version": "0.2.0",
        "state": "ready",
        "expires": time.time() + 600,
    }
    return ServerRecord(**(given | fields))


# In one process.


def test_what_is_published_is_found_until_it_expires() -> None:
    now = [100.0]
    directory = LocalDirectory(clock=lambda: now[0], longest=LONGEST)
    asyncio.run(directory.publish(record(expires=130.0)))
    assert [found.peer for found in asyncio.run(directory.servers())] == ["QmA"]
    now[0] = 130.0
    assert asyncio.run(directory.servers()) == []
    assert asyncio.run(directory.models()) == []


def test_a_server_has_one_record_and_withdraws_it() -> None:
    async def scenario() -> None:
        directory = LocalDirectory(longest=LONGEST)
        await directory.publish(record(active=0))
        await directory.publish(record(active=3))
        assert [found.active for found in await directory.servers()] == [3]
        await directory.withdraw("QmA")
        await directory.withdraw("QmA")
        assert await directory.servers() == []

    asyncio.run(scenario())


def test_servers_are_found_by_model_in_order_of_their_spans() -> None:
    async def scenario() -> None:
        directory = LocalDirectory(longest=LONGEST)
        for published in (record("QmB", start=4, end=8), record("QmA"), record("QmC", model="b"), record("QmD", model="b")):
            await directory.publish(published)
        await directory.publish(record("QmE", model="b"))
        assert [found.peer for found in await directory.servers("0123456789abcdef")] == ["QmA", "QmB"]
        assert await directory.models() == ["b", "0123456789abcdef"]

    asyncio.run(scenario())


@pytest.mark.parametrize("lifetime", [-1.0, MAX_LIFETIME + 1])
def test_a_record_lives_neither_in_the_past_nor_for_ever(lifetime: float) -> None:
    with pytest.raises(InvalidSetting, match="expires"):
        asyncio.run(LocalDirectory(clock=lambda: 1e6).publish(record(expires=1e6 + lifetime)))


def test_a_record_that_nobody_would_believe_is_not_published() -> None:
    with pytest.raises(InvalidSetting, match="name"):
        asyncio.run(LocalDirectory().publish(record(name="\n")))


# Who may write: the validator that every node has, without a network.


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, Identity]:
    folder = tmp_path_factory.mktemp("identities")
    return Identity.load(folder / "ours"), Identity.load(folder / "theirs")


def signed(
    identity: Identity, entries: SignedEntries | None = None, value: bytes = b"says this", key: str = INDEX, says: str | None = None
) -> DHTRecord:
    """An entry under `key` as hivemind would send it to other nodes."""
    place = bytes(DHTID.generate(key).to_bytes())
    placed = msgspec.msgpack.encode(encode_placed(key if says is None else says, value))
    packed = DHTRecord(place, msgspec.msgpack.encode(identity.public_key), placed, 2e9)
    return replace(packed, value=(entries or SignedEntries(identity)).sign_value(packed))


def test_an_identity_is_the_peer_that_libp2p_makes_of_its_file(tmp_path: Path) -> None:
    from hivemind.p2p import PeerID

    identity = Identity.load(tmp_path / "identity")
    assert identity.peer == PeerID.from_identity((tmp_path / "identity").read_bytes()).to_base58()
    assert Identity.load(tmp_path / "identity").peer == identity.peer


@pytest.mark.parametrize("content", [b"", b"not a key", b"\x08\x00\x12\x03abc"])
def test_a_file_without_a_key_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "identity").write_bytes(content)
    with pytest.raises(InvalidSetting, match="identity"):
        Identity.load(tmp_path / "identity")


def test_a_signed_entry_is_valid_for_everybody(identities: tuple[Identity, Identity]) -> None:
    entry = signed(identities[0])
    for reader in (SignedEntries(identities[0]), SignedEntries(identities[1]), SignedEntries()):
        assert reader.validate(entry)
        assert reader.strip_value(entry) == msgspec.msgpack.encode(encode_placed(INDEX, b"says this"))


def test_a_foreign_entry_is_not_signed(identities: tuple[Identity, Identity]) -> None:
    ours, theirs = identities
    entry = signed(theirs, SignedEntries(ours))
    assert entry.value == msgspec.msgpack.encode(encode_placed(INDEX, b"says this"))
    assert not SignedEntries(ours).validate(entry)


@pytest.mark.parametrize("part", ["key", "subkey", "value", "expiration_time"])
def test_an_entry_moved_changed_or_prolonged_is_refused(identities: tuple[Identity, Identity], part: str) -> None:
    ours, theirs = identities
    entry, other = signed(ours), signed(theirs, value=b"says that")
    forged = {"key": b"j" * 20, "subkey": other.subkey, "value": other.value, "expiration_time": 2e9 + 1}
    assert not SignedEntries().validate(replace(entry, **{part: forged[part]}))


@pytest.mark.parametrize(
    "fields",
    [
        {"subkey": b"\xc0"},  # hivemind's mark of a plain value
        {"subkey": b""},  # of a whole dictionary
        {"subkey": msgspec.msgpack.encode("a name")},
        {"subkey": msgspec.msgpack.encode(b"ssh-rsa AAAA")},
        {"subkey": msgspec.msgpack.encode(b"x" * 5000)},
        {"value": b""},
        {"value": b"\xc1"},
        {"value": bytes(MAX_ENTRY_BYTES + 1)},
        {"value": "text"},
        {"expiration_time": float("inf")},
        {"expiration_time": float("nan")},
        {"expiration_time": "later"},
    ],
    ids=str,
)
def test_an_entry_of_another_form_is_refused(identities: tuple[Identity, Identity], fields: dict[str, Any]) -> None:
    assert not SignedEntries().validate(replace(signed(identities[0]), **fields))


def test_a_key_has_one_spelling(identities: tuple[Identity, Identity]) -> None:
    """Else one server could stand in the directory under many subkeys."""
    ours = identities[0]
    disguised = Identity(ours.key)
    disguised.public_key = ours.public_key + b" a comment"
    assert not SignedEntries().validate(signed(disguised, SignedEntries(disguised)))


def test_a_subkey_packed_otherwise_is_the_same_writer(identities: tuple[Identity, Identity]) -> None:
    """A node packs it anew when it hands it on: what it accepted must stay valid, or all it hands on is dropped."""
    entry = signed(identities[0])
    public_key = identities[0].public_key
    longer = b"\xc6" + len(public_key).to_bytes(4, "big") + public_key
    assert longer != entry.subkey
    assert SignedEntries().validate(replace(entry, subkey=longer))


def test_a_value_that_hivemind_could_not_unpack_is_refused(identities: tuple[Identity, Identity]) -> None:
    ours = SignedEntries(identities[0])
    for value in (b"\xc1", b"\xc4\x05ab", b"\x01", msgspec.msgpack.encode(b"in no place")):
        raw = replace(signed(identities[0]), value=value)
        assert not ours.validate(replace(raw, value=ours.sign_value(raw)))


def test_a_swarm_with_a_secret_refuses_strangers(identities: tuple[Identity, Identity]) -> None:
    member = SignedEntries(identities[0], SECRET)
    assert SignedEntries(None, SECRET).validate(signed(identities[0], member))
    for stranger in (SignedEntries(identities[1]), SignedEntries(identities[1], b"guessed")):
        assert not member.validate(signed(identities[1], stranger))
    assert not SignedEntries().validate(signed(identities[0], member))


def test_a_dht_serves_one_identity_and_one_secret(identities: tuple[Identity, Identity]) -> None:
    ours = SignedEntries(identities[0], SECRET)
    assert ours.merge_with(SignedEntries(identities[0], SECRET))
    for other in (SignedEntries(identities[1], SECRET), SignedEntries(identities[0]), SignedEntries(None, SECRET)):
        with pytest.raises(ValueError, match="another identity or secret"):
            ours.merge_with(other)


@pytest.mark.parametrize("key", ["anything", "", "corolla/2/model/", "corolla/2/model/a b", "corolla/1/models"])
def test_only_keys_that_corolla_uses_are_valid(identities: tuple[Identity, Identity], key: str) -> None:
    assert SignedEntries().validate(signed(identities[0], key=model_key("0123456789abcdef")))
    assert not SignedEntries().validate(signed(identities[0], key=key))
    assert not SignedEntries().validate(signed(identities[0], key=key, says=INDEX))


def test_refusals_are_logged(
    identities: tuple[Identity, Identity], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("corolla.swarm.signatures"), "filters", [])  # other tests have had their lines
    assert not SignedEntries().validate(replace(signed(identities[0]), expiration_time=2e9 + 1))
    assert f"peer {identities[0].peer} did not sign it" in caplog.text


# Over real nodes. Each start takes seconds, so one scenario tells the whole story.

# hivemind finds its daemon through a deprecated function, and forks its DHT process, which Python 3.12 and later warn of.
over_hivemind = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@contextmanager
def node(folder: Path, name: str, secret: bytes | None, peers: list[str]) -> Iterator[tuple[Any, SignedEntries]]:
    """A DHT node on loopback, with the validator of its identity. Made while an event loop runs, or hivemind makes one and leaves it."""
    entries = SignedEntries(Identity.load(folder / name), secret)
    dht = hivemind.DHT(initial_peers=peers, record_validators=[entries], identity_path=str(folder / name), start=True)
    try:
        yield dht, entries
    finally:
        dht.shutdown()


async def until_found(directory: HivemindDirectory, *names: str, model: str | None = None) -> None:
    """Return as soon as the servers are just those of these names; routing tables fill in the background."""
    async with asyncio.timeout(60):
        while sorted(found.name for found in await directory.servers(model)) != sorted(names):
            await asyncio.sleep(0.1)


@over_hivemind
def test_two_nodes_share_a_directory(tmp_path: Path) -> None:
    async def scenario(one: tuple[Any, SignedEntries], two: tuple[Any, SignedEntries]) -> None:
        (first, a), (second, b) = (
            (HivemindDirectory(*side, HivemindDirectoryConfig(longest=LONGEST)), side[1].identity.peer) for side in (one, two)
        )
        assert str(one[0].peer_id) == a  # what libp2p calls itself and what signs are one key

        await first.publish(record(a, name="first"))
        await second.publish(record(b, start=4, end=8, name="second"))
        for directory in (first, second):
            await until_found(directory, "first", "second")
            assert await directory.models() == ["0123456789abcdef"]

        # Only a server itself writes its record, through the directory or around it.
        with pytest.raises(InvalidSetting, match="peer"):
            await second.publish(record(a))
        with pytest.raises(InvalidSetting, match="peer"):
            await second.withdraw(a)
        for subkey in (one[1].identity.public_key, two[1].identity.public_key + b" ", "a name", None):
            put = partial(
                two[0].store,
                model_key("0123456789abcdef"),
                encode_placed(model_key("0123456789abcdef"), b"forged"),
                time.time() + 600,
                subkey,
            )
            assert not await asyncio.to_thread(put)
        await until_found(first, "first", "second")

        # A record signed by its writer that names another peer is stored, and not believed.
        second._identity, honest = _Posing(a, two[1]), second._identity
        await second.publish(record(a, name="posing"))
        second._identity = honest
        await until_found(first, "first")

        # A shorter lifetime than what stands changes what is read, and keeps what stands.
        await second.publish(record(b, name="again", expires=time.time() + 40))
        await until_found(first, "first", "again")

        # A server moves to another model, and leaves.
        await second.publish(record(b, model="other", name="moved"))
        await until_found(first, "moved", model="other")
        await until_found(first, "first", model="0123456789abcdef")
        await second.withdraw(b)
        await second.withdraw(b)
        await until_found(first, "first")
        assert await first.models() == ["0123456789abcdef"]

        # It comes back as a new process, which knows nothing of what it stored before.
        reborn = HivemindDirectory(*two, HivemindDirectoryConfig(longest=LONGEST))
        await reborn.publish(record(b, model="other", name="reborn", expires=time.time() + 300))
        await until_found(first, "reborn", model="other")

    async def on_two_nodes() -> None:
        with node(tmp_path, "one", SECRET, []) as one:
            addresses = [str(address) for address in one[0].get_visible_maddrs()]
            with node(tmp_path, "two", SECRET, addresses) as two:
                await scenario(one, two)

    asyncio.run(on_two_nodes())


class _Posing:
    """An identity that passes for another peer before its own checks, and signs as itself."""

    def __init__(self, peer: str, entries: SignedEntries) -> None:
        assert entries.identity is not None
        self.peer, self.public_key = peer, entries.identity.public_key


@over_hivemind
def test_a_node_that_has_ended_is_a_network_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        with node(tmp_path, "one", None, []) as one:
            directory = HivemindDirectory(*one, HivemindDirectoryConfig(longest=LONGEST))
            await asyncio.to_thread(one[0].shutdown)
            with pytest.raises(NetworkError, match="ended"):
                await directory.servers()

    asyncio.run(scenario())


class Unaskable:
    """A node that lives, and cannot be asked."""

    def is_alive(self) -> bool:
        return True

    def add_validators(self, validators: object) -> None:
        pass

    def get(self, *key: object, **options: object) -> None:
        raise RuntimeError("Broken pipe")


def test_an_error_that_nobody_expects_counts_as_no_answer() -> None:
    directory = HivemindDirectory(Unaskable(), SignedEntries())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        asyncio.run(directory.servers("abc"))
    assert directory.silent_for > 0
