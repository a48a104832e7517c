"""Two peers prove to one another that they know the swarm's secret, before the first frame.

Both send a fresh nonce; then the dialer proves, and only to a dialer that did so does the listener prove: who merely knocks
learns nothing to guess the secret from. A proof is a MAC over the protocol's version, the prover's role, both peers' ids and both
nonces, so it is of no use in another connection, in the other direction, or from another peer. The ids are those that
libp2p's TLS vouches for; without it a proof binds nothing.

    dialer                      listener
    hello (nonce)       ->
                        <-      hello (nonce)
    proof               ->      checks
    checks              <-      proof

An open swarm has no secret: the same messages, which then prove nothing but that both sides mean an open swarm.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Literal

from corolla.errors import InvalidSetting, Unauthorized

Role = Literal["dialer", "listener"]

_NONCE_BYTES = 32
_MAGIC = b"CRL1"  # of this version of the handshake
_HELLO, _PROOF = b"h", b"p"
_OPEN, _SECRET = b"o", b"s"
MESSAGE_BYTES = len(_MAGIC) + 2 + _NONCE_BYTES  # of every message; a proof is as long as a nonce


class Handshake:
    """One side of one handshake. `me` and `peer` are peer ids; a `secret` of None is an open swarm.

    `run` drives it over a stream; `hello`, `greeted`, `proof` and `check` are its steps. Raises `InvalidSetting` for an empty
    secret and `Unauthorized` for a peer that does not prove what it should, itself included.
    """

    def __init__(self, secret: bytes | None, me: str, peer: str, role: Role) -> None:
        if me == peer:
            raise Unauthorized("a peer does not shake hands with itself")
        self._me, self._peer, self._role = me, peer, role
        self._mode = _OPEN if secret is None else _SECRET
        self._key = b"" if secret is None else derive_key(secret, b"handshake")
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._their_nonce: bytes | None = None
        self.done = False  # the peer has proved

    def hello(self) -> bytes:
        """The first message to the peer."""
        return _MAGIC + _HELLO + self._mode + self._nonce

    def greeted(self, message: bytes) -> None:
        """Take the peer's hello. Raises `Unauthorized` for a peer of another kind of swarm and for a second hello."""
        nonce = self._body(message, _HELLO)
        if self._their_nonce is not None or hmac.compare_digest(nonce, self._nonce):
            raise Unauthorized(f"peer {self._peer} repeated a hello: connection refused")
        self._their_nonce = nonce

    def proof(self) -> bytes:
        """The second message. Raises `Unauthorized` on the listener's side before the dialer has proved."""
        if self._role == "listener" and not self.done:
            raise Unauthorized(f"peer {self._peer} has not proved that it knows the secret")
        return _MAGIC + _PROOF + self._mode + self._mac(self._role)

    def check(self, message: bytes) -> None:
        """Take the peer's proof. Raises `Unauthorized` when it proves nothing."""
        other: Role = "listener" if self._role == "dialer" else "dialer"
        if not hmac.compare_digest(self._body(message, _PROOF), self._mac(other)):
            raise Unauthorized(f"peer {self._peer} does not know this swarm's secret: give both sides the same one")
        self.done = True

    async def run(self, read: Callable[[int], Awaitable[bytes]], write: Callable[[bytes], Awaitable[None]]) -> None:
        """All of it: `read(n)` returns exactly n bytes. The deadline is the caller's.

        Raises `Unauthorized`, and whatever the stream raises.
        """
        if self._role == "dialer":
            await write(self.hello())
            self.greeted(await read(MESSAGE_BYTES))
            await write(self.proof())
            self.check(await read(MESSAGE_BYTES))
        else:
            self.greeted(await read(MESSAGE_BYTES))
            await write(self.hello())
            self.check(await read(MESSAGE_BYTES))
            await write(self.proof())

    def _body(self, message: bytes, kind: bytes) -> bytes:
        if len(message) != MESSAGE_BYTES or message[:4] != _MAGIC or message[4:5] != kind:
            raise Unauthorized(f"peer {self._peer} does not speak this version of the handshake: update the older side")
        if message[5:6] != self._mode:
            ours, theirs = ("an open swarm", "a secret") if self._mode == _OPEN else ("a secret", "an open swarm")
            raise Unauthorized(f"peer {self._peer} expects {theirs} and this side {ours}: give both sides the same secret, or none")
        return message[6:]

    def _mac(self, role: Role) -> bytes:
        """What the peer in that role proves with."""
        if self._their_nonce is None:
            raise Unauthorized(f"peer {self._peer} has sent no hello")
        mine = (self._me.encode(), self._nonce)
        theirs = (self._peer.encode(), self._their_nonce)
        dialer, listener = (mine, theirs) if self._role == "dialer" else (theirs, mine)
        # Each part after its length, so that no two lists of parts read the same.
        parts = (_MAGIC, self._mode, role.encode(), *dialer, *listener)
        return hmac.digest(self._key, b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256")


@lru_cache(maxsize=16)
def derive_key(secret: bytes, purpose: bytes) -> bytes:
    """A key of 32 bytes for one purpose: knowing one does not give another, nor the secret.

    Slow on purpose (scrypt with 16 MiB), for secrets that people choose, and remembered. Raises `InvalidSetting` for an empty secret.
    """
    if not secret:
        raise InvalidSetting("secret", "it is empty; give some text, or leave the setting out for an open swarm")
    stretched = hashlib.scrypt(secret, salt=b"corolla swarm secret 1", n=2**14, r=8, p=1, dklen=32)
    return hmac.digest(stretched, b"corolla " + purpose, "sha256")
