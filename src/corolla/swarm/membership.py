"""The DHT's own calls are for those who know the swarm's secret: every question and every answer carries a MAC.

hivemind asks an authorizer about each call. It does not tell it who calls, so a MAC binds what is said, its kind, its time and a
nonce, and not the peer: somebody whom a member dials by itself can pass that member's call on, once to each node, within
the time it lasts, and its answer back. What lies in the directory is signed all the same (`signatures`).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable
from typing import Any

from hivemind.dht.protocol import DHTProtocol
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthorizerBase
from hivemind.utils.timed_storage import TimedStorage, get_dht_time

from corolla.errors import Unauthorized
from corolla.swarm.handshake import derive_key
from corolla.swarm.limits import Sparing

LIFETIME = 60.0  # seconds that a call may be under way, the clocks' difference included; a DHT takes no more than 3 of that
_NONCE_BYTES = 16
_MAX_NONCES = 2**15  # that are remembered, so that no call is answered twice: about 12 MB, and 270 calls a second
_REFUSAL = "this swarm's directory is for those who know its secret"
log = logging.getLogger(__name__)
log.addFilter(Sparing())  # a stranger is not to fill the disk


class Members(AuthorizerBase):
    """The authorizer. Give it to `hivemind.DHT(authorizer=...)` on every node of the swarm; an open swarm has none.

    `clock` returns the time as all nodes agree on it, in seconds.
    """

    def __init__(self, secret: bytes, clock: Callable[[], float] = get_dht_time) -> None:
        self._key = derive_key(secret, b"directory calls")
        self._clock = clock
        self._answered: TimedStorage[bytes, None] = TimedStorage()

    async def sign_request(self, request: Any, service_public_key: Any) -> None:
        """Add to a call what proves that a member makes it."""
        request.auth.time = self._clock()
        request.auth.nonce = secrets.token_bytes(_NONCE_BYTES)
        request.auth.signature = self._mac(b"request", request)

    async def validate_request(self, request: Any) -> bool:
        """Whether a call may be answered. Raises `Unauthorized`, which hivemind tells the caller, where it may not."""
        nonce, at = request.auth.nonce, request.auth.time
        if not self._proves(b"request", request):
            raise self._refusal("its caller does not know the secret")
        if not abs(at - self._clock()) <= LIFETIME:
            raise self._refusal(f"it is not of these {LIFETIME:g} s")
        if len(nonce) != _NONCE_BYTES or nonce in self._answered:
            raise self._refusal("it is repeated")
        if len(self._answered) >= _MAX_NONCES:  # to forget one would be to answer it again
            raise self._refusal("members call too often")
        self._answered.store(nonce, None, get_dht_time() + 2 * LIFETIME)
        return True

    async def sign_response(self, response: Any, request: Any) -> None:
        """Add to an answer what proves that a member gives it, and to which call."""
        response.auth.nonce = request.auth.nonce
        response.auth.signature = self._mac(b"response", response)

    async def validate_response(self, response: Any, request: Any) -> bool:
        """Whether an answer is a member's, to this call."""
        return response.auth.nonce == request.auth.nonce and self._proves(b"response", response)

    def _refusal(self, reason: str) -> Unauthorized:
        log.warning("a call of the directory was refused: %s", reason)
        return Unauthorized(_REFUSAL)

    def _proves(self, way: bytes, message: Any) -> bool:
        mac = message.auth.signature
        message.auth.signature = b""
        return hmac.compare_digest(mac, self._mac(way, message))

    def _mac(self, way: bytes, message: Any) -> bytes:
        """Of a message whose signature is still empty. Its kind counts, or a call of one kind might read as one of another."""
        return hmac.digest(self._key, b"\0".join((way, message.DESCRIPTOR.full_name.encode(), message.SerializeToString())), "sha256")


async def is_closed(p2p: P2P, peer: PeerID, timeout: float) -> bool:
    """Whether a node answers members only. Raises `TimeoutError` and hivemind's errors for one that does not answer at all."""
    try:
        async with asyncio.timeout(timeout):
            await p2p.call_protobuf_handler(peer, f"{DHTProtocol.__name__}.rpc_ping", dht_pb2.PingRequest(), dht_pb2.PingResponse)
    except P2PHandlerError as error:
        if _REFUSAL not in str(error):
            raise
        return True
    return False
