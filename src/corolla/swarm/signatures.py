"""Who may write what into the swarm's directory: every entry is signed by the libp2p key that makes its writer's peer id.

`SignedEntries` is a validator of hivemind's DHT: a node that has it neither stores nor believes anything else. An entry's subkey
is the writer's public key; the entry says which key of the DHT it lies under. With a swarm secret it carries a MAC as well, so
that strangers cannot announce servers.

What an entry says is not looked at here but by its reader. hivemind drops all that a node answers when one entry is refused, so
what is valid must be valid for everybody: it depends neither on clocks nor on a version's idea of a record.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
from functools import lru_cache
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from corolla.errors import InvalidSetting, ServerFault
from corolla.swarm.handshake import derive_key
from corolla.swarm.limits import Sparing
from corolla.swarm.places import decode_placed
from corolla.swarm.records import MAX_RECORD_BYTES

MAX_ENTRY_BYTES = MAX_RECORD_BYTES + 2048  # with signature, MAC and framing
_MAX_KEY_BYTES = 1024  # of a public key as text; one of 4096 bits takes 724
_DOMAIN = b"corolla directory 2"
log = logging.getLogger(__name__)
log.addFilter(Sparing())  # anybody may offer an entry


class Identity:
    """A server's libp2p key: it makes the peer's id, and signs what the server announces."""

    def __init__(self, key: RSAPrivateKey) -> None:
        self.key = key
        self.public_key: bytes = key.get_public_key().to_bytes()  # as one line of text, in OpenSSH's format
        self.peer = peer_of(self.public_key)  # base58

    @classmethod
    def load(cls, path: Path) -> Identity:
        """The key in the file that hivemind's `identity_path` names; a new one is made where there is no file.

        Raises `InvalidSetting` for a file that holds none.
        """
        try:
            if not path.exists():
                P2P.generate_identity(str(path))
            encoded = crypto_pb2.PrivateKey.FromString(path.read_bytes())
            key = RSAPrivateKey.__new__(RSAPrivateKey)  # its __init__ would make a key, only to throw it away
            key.__setstate__({"_private_key": encoded.data})
            return cls(key)
        except (OSError, DecodeError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm, ServerFault) as error:
            raise InvalidSetting("identity", f"{path} holds no RSA key of libp2p ({error}); delete it to have a new one made") from error


@lru_cache(maxsize=2048)
def peer_of(public_key: bytes) -> str:
    """The libp2p id, base58, of an RSA key in OpenSSH's format. Raises `ServerFault` for anything else.

    A key has one spelling: with more of them one server could stand in the directory many times.
    """
    if len(public_key) > _MAX_KEY_BYTES:
        raise ServerFault(f"a public key takes {len(public_key)} bytes, at most {_MAX_KEY_BYTES} are read")
    try:
        key = serialization.load_ssh_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ServerFault(f"a public key cannot be read ({error})") from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise ServerFault("a public key is not of RSA")
    if key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) != public_key:
        raise ServerFault("a public key is not in its one spelling")
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    encoded = crypto_pb2.PublicKey(key_type=crypto_pb2.KeyType.RSA, data=der).SerializeToString()
    return PeerID(b"\x12\x20" + hashlib.sha256(encoded).digest()).to_base58()  # 12 20: a multihash of SHA-256, 32 bytes


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    value: bytes  # as hivemind packs the bytes that the application stores
    mac: bytes  # empty in an open swarm
    signature: bytes  # PSS with SHA-256, base64


_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)
_bytes_decoder = msgspec.msgpack.Decoder(bytes)


class SignedEntries(RecordValidatorBase):
    """The validator. Without an `identity` nothing can be stored, only read; a `secret` of None is an open swarm.

    Give it to `hivemind.DHT(record_validators=[...])`, with the same key as `identity_path`.
    """

    def __init__(self, identity: Identity | None = None, secret: bytes | None = None) -> None:
        self.identity = identity
        self._mac_key = None if secret is None else derive_key(secret, b"directory")

    def validate(self, record: DHTRecord) -> bool:
        """Whether the entry is whole, bounded, in its place, and written by the key that its subkey names. Logs why not."""
        problem = self._problem(record)
        if problem is not None:
            log.warning("refused a directory entry: %s", problem)
        return problem is None

    def sign_value(self, record: DHTRecord) -> bytes:
        """The entry with its signature; what is not ours to write stays as it is, and is then refused."""
        if self.identity is None or record.subkey != msgspec.msgpack.encode(self.public_key):
            return record.value
        signed = _signed(record, self.identity.public_key, record.value)
        return msgspec.msgpack.encode(_Envelope(record.value, self._mac(signed), self.identity.key.sign(signed)))

    def strip_value(self, record: DHTRecord) -> bytes:
        """What was stored, of an entry that is valid."""
        return _envelope_decoder.decode(record.value).value

    def merge_with(self, other: RecordValidatorBase) -> bool:
        """A DHT has one of these; the same again adds nothing. Raises `ValueError` for another identity or secret."""
        if isinstance(other, SignedEntries) and (self._mac_key, self.public_key) != (other._mac_key, other.public_key):
            raise ValueError("the DHT was made for another identity or secret than its directory")
        return isinstance(other, SignedEntries)

    @property
    def public_key(self) -> bytes | None:
        """Of the identity, if there is one."""
        return None if self.identity is None else self.identity.public_key

    def _problem(self, record: DHTRecord) -> str | None:
        if not isinstance(record.value, bytes) or len(record.value) > MAX_ENTRY_BYTES:
            return f"it takes more than {MAX_ENTRY_BYTES} bytes"
        if not isinstance(record.expiration_time, float) or not math.isfinite(record.expiration_time):
            return "it expires at no time"
        try:
            envelope = _envelope_decoder.decode(record.value)
            public_key = _bytes_decoder.decode(record.subkey)
            # hivemind unpacks the value unguarded when it is read.
            placed = decode_placed(_bytes_decoder.decode(envelope.value))
            if _hash_of(placed.key) != record.key:
                return "it lies under another key than it says"
            peer = peer_of(public_key)
        except (msgspec.DecodeError, ServerFault) as error:
            return str(error)
        signed = _signed(record, public_key, envelope.value)
        if not hmac.compare_digest(self._mac(signed), envelope.mac):
            return "its writer does not know this swarm's secret" if self._mac_key else "its swarm has a secret and this one is open"
        if not RSAPublicKey.from_bytes(public_key).verify(signed, envelope.signature):
            return f"peer {peer} did not sign it"
        return None

    def _mac(self, signed: bytes) -> bytes:
        return b"" if self._mac_key is None else hmac.digest(self._mac_key, signed, "sha256")


@lru_cache(maxsize=256)
def _hash_of(key: str) -> bytes:
    return bytes(DHTID.generate(key).to_bytes())


def _signed(record: DHTRecord, public_key: bytes, value: bytes) -> bytes:
    """What the signature covers: the place, the writer, the value and the time. The public key rather than the subkey's bytes,
    which may be packed in several ways and are packed anew by every node that hands them on."""
    return msgspec.msgpack.encode((_DOMAIN, record.key, public_key, value, record.expiration_time))
