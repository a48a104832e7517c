from __future__ import annotations

import asyncio
import time
import warnings
from typing import Any

import pytest

from corolla.errors import NetworkError, Unauthorized

# hivemind scripts a function as it is imported, which torch 2.13 calls deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from hivemind import DHT
    from hivemind.p2p import P2P, PeerID
    from hivemind.proto import dht_pb2

    from corolla.swarm.membership import LIFETIME, Members, is_closed
    from corolla.swarm.peer import PeerConfig, SwarmPeer

SECRET = b"correct horse battery staple"


def asked(by: Members) -> Any:
    request = dht_pb2.FindRequest(keys=[b"a key"])
    asyncio.run(by.sign_request(request, None))
    return request


def answered(by: Members, request: Any) -> Any:
    response = dht_pb2.FindResponse(results=[dht_pb2.FindResult(value=b"a value")])
    asyncio.run(by.sign_response(response, request))
    return response


def copy(message: Any) -> Any:
    """As it comes out of the network."""
    return type(message).FromString(message.SerializeToString())


def test_members_ask_and_answer() -> None:
    one, other = Members(SECRET), Members(SECRET)
    request = asked(one)
    assert asyncio.run(other.validate_request(copy(request)))
    assert asyncio.run(one.validate_response(copy(answered(other, request)), request))


def test_a_stranger_is_refused_and_the_refusals_fill_no_disk(caplog: pytest.LogCaptureFixture) -> None:
    member = Members(SECRET)
    for _ in range(50):
        for request in (asked(Members(b"guessed")), dht_pb2.FindRequest(keys=[b"a key"])):
            with pytest.raises(Unauthorized, match="know its secret"):
                asyncio.run(member.validate_request(request))
    assert 1 <= len(caplog.records) <= 25
    request = asked(member)
    assert not asyncio.run(member.validate_response(answered(Members(b"guessed"), request), request))
    assert not asyncio.run(member.validate_response(dht_pb2.FindResponse(), request))


def test_a_changed_call_is_refused() -> None:
    member = Members(SECRET)
    for field, value in (("keys", b"another"), ("time", 1.0), ("nonce", b"another")):
        request = asked(member)
        if field == "keys":
            request.keys.append(value)
        else:
            setattr(request.auth, field, value)
        with pytest.raises(Unauthorized):
            asyncio.run(member.validate_request(request))
    ping = dht_pb2.PingRequest()
    ping.auth.CopyFrom(asked(member).auth)
    with pytest.raises(Unauthorized):
        asyncio.run(member.validate_request(ping))


def test_a_call_is_answered_once_and_in_its_time() -> None:
    member = Members(SECRET)
    request = asked(Members(SECRET))
    assert asyncio.run(member.validate_request(copy(request)))
    with pytest.raises(Unauthorized):
        asyncio.run(member.validate_request(copy(request)))
    for off in (-LIFETIME - 1, LIFETIME + 1):
        with pytest.raises(Unauthorized):
            asyncio.run(member.validate_request(asked(Members(SECRET, lambda off=off: time.time() + off))))


def test_an_answer_is_to_one_call_and_no_call() -> None:
    member = Members(SECRET)
    first, second = asked(member), asked(member)
    assert not asyncio.run(member.validate_response(copy(answered(member, first)), second))
    reflected = dht_pb2.FindRequest()
    reflected.auth.nonce, reflected.auth.signature = (answer := answered(member, first).auth).nonce, answer.signature
    with pytest.raises(Unauthorized):
        asyncio.run(member.validate_request(reflected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind's daemon, and its fork beside threads
def test_strangers_do_not_join_nor_write() -> None:
    peer = SwarmPeer(PeerConfig(secret=SECRET))
    member = SwarmPeer(PeerConfig(secret=SECRET, initial_peers=peer.addresses, client_mode=True))
    assert member.servers() == []
    member.close()
    for secret in (None, b"guessed"):
        with pytest.raises(NetworkError, match="the same secret"):
            SwarmPeer(PeerConfig(secret=secret, initial_peers=peer.addresses, client_mode=True))
    # Around the check at the start: a node that asks anyhow.
    stranger = DHT(initial_peers=peer.addresses, start=True, ensure_bootstrap_success=False)
    stranger.store("anything", b"junk", time.time() + 600)
    assert stranger.get("anything").value == b"junk"  # it keeps its own to itself
    assert peer._dht.get("anything", latest=True) is None
    stranger.shutdown()
    peer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("secret", [SECRET, None])
def test_whoever_asks_is_told_whether_a_swarm_is_closed(secret: bytes | None) -> None:
    peer = SwarmPeer(PeerConfig(secret=secret))
    address = peer.addresses[0]

    async def ask() -> bool:
        p2p = await P2P.create(initial_peers=[address], dht_mode="client")
        try:
            return await is_closed(p2p, PeerID.from_base58(address.rpartition("/")[2]), 30.0)
        finally:
            await p2p.shutdown()

    assert asyncio.run(ask()) is (secret is not None)
    peer.close()
