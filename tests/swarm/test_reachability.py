from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from corolla.swarm.hosts import GREETING
from tests.swarm.harness import OVER_HIVEMIND
from tests.swarm.test_dht import joined, until

# hivemind scripts a function as it is imported, which torch 2.13 calls deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from corolla.swarm.reachability import judge, place_of

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
LOOPBACK, LAN, GLOBAL, OTHER = map(ipaddress.ip_address, ("127.0.0.1", "192.168.1.5", "8.8.8.8", "8.8.4.4"))


def test_a_place_is_an_ip_address_and_a_tcp_port() -> None:
    assert place_of("/ip4/192.168.1.5/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N") == (LAN, 4001)
    assert place_of("/ip6/::1/tcp/1") == (ipaddress.ip_address("::1"), 1)
    for other in ("", "x", "/dns4/example.org/tcp/1", "/ip4/1.2.3.4/udp/1/quic-v1", "/ip4/1.2.3.4", "/ip4/1.2.3.4/tcp/1/ws"):
        assert place_of(other) is None


@pytest.mark.parametrize(
    ("ip", "seen", "verdict"),
    [
        (LAN, [GLOBAL], False),  # behind a router
        (LOOPBACK, [LAN], False),  # it listens to its own machine only
        (LAN, [LOOPBACK], None),  # the same machine asks
        (OTHER, [GLOBAL], None),  # a router's other address, maybe: strangers are not dialled for anybody
        (LAN, [], None),
    ],
)
def test_only_where_a_peer_comes_from_is_dialled(
    ip: ipaddress.IPv4Address, seen: list[ipaddress.IPv4Address], verdict: bool | None
) -> None:
    assert asyncio.run(judge((ip, 1), seen)) is verdict


@contextmanager
def answering(greeting: bytes) -> Iterator[int]:
    """The port of something that answers each connection with a greeting."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(greeting)
                connection.recv(64)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(("greeting", "verdict"), [(GREETING, True), (b"HTTP/1.1 400 Bad Request", False)])
def test_a_peer_is_reached_where_libp2p_answers(greeting: bytes, verdict: bool) -> None:
    with answering(greeting) as port:
        assert asyncio.run(judge((LOOPBACK, port), [LOOPBACK])) is verdict


def test_nobody_is_reached_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert asyncio.run(judge((LOOPBACK, port), [LOOPBACK])) is False


@OVER_HIVEMIND[0]
@OVER_HIVEMIND[1]
@OVER_HIVEMIND[2]
def test_peers_tell_one_another_whether_they_can_be_dialled(caplog: pytest.LogCaptureFixture) -> None:
    lone = joined()
    with socket.create_server(("127.0.0.1", 0)) as taken:  # a port that is another program's
        port = taken.getsockname()[1]
        hidden = joined(initial_peers=lone.addresses, announce=[f"/ip4/127.0.0.1/tcp/{port}"])
        until(lambda: hidden.reachable is False)
        assert [entry for entry in caplog.records if "cannot dial this one" in entry.getMessage()]
    plain = joined(initial_peers=lone.addresses)
    until(lambda: plain.reachable is True)
    assert lone.reachable is not False  # it had nobody to ask at first
    for peer in (plain, hidden, lone):
        peer.close()
