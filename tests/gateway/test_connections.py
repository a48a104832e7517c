"""How long a connection may keep a request back, how large its headers may be, and how many one address has."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

from corolla.gateway.middleware import AccessConfig
from corolla.gateway.protocol import ConnectionLimits
from corolla.gateway.service import GatewayConfig
from tests.gateway.running import DEADLINE, Running, TinySwarm, running

ASKED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def strict(swarm: TinySwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = ConnectionLimits(headers=0.5, rest=1.0, idle=1, bytes=2000, of_one=8)
    config = GatewayConfig(connections=limits, access=AccessConfig(read=0.5), drain=0.1)
    with running(swarm, tmp_path_factory.mktemp("strict") / "g.sqlite", config) as gateway:
        yield gateway


@contextmanager
def connected(gateway: Running, *sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", httpx2.URL(gateway.url).port or 0), timeout=DEADLINE) as client:
        for each in sent:
            client.sendall(each)
        yield client


def heard(client: socket.socket) -> bytes:
    """All until the end."""
    whole = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(65536):
            whole += piece
    return whole


def test_an_idle_connection_is_closed(strict: Running) -> None:
    with connected(strict) as silent, connected(strict, ASKED) as idle:
        assert heard(silent) == b""
        assert heard(idle).endswith(b"ok\n")


@pytest.mark.parametrize(
    "sent",
    [
        [b"GET /x HTTP/1.1\r\nX-A: "],
        [ASKED, b"GET /x HTTP/1.1\r\nHost: localhost\r\nX-A: "],
        [ASKED, b"\r\n"],
        [b"POST /api/ui/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nContent-Type: application/json\r\n\r\n"],
        [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n"],
        [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"],
    ],
)
def test_a_byte_now_and_then_keeps_no_connection(strict: Running, sent: list[bytes]) -> None:
    began = time.monotonic()
    with connected(strict, *sent) as slow:
        slow.settimeout(0.1)
        while time.monotonic() < began + DEADLINE:
            try:
                slow.send(b"\n" if sent[-1] == b"\r\n" else b"a")
                if slow.recv(1000) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("piece", [b"X-A: " + b"a" * 3000 + b"\r\n\r\n", b"X-A: " + b"a" * 300_000, b"X-A: b\r\n" * 500, b"X" * 3000])
def test_headers_have_a_bound(strict: Running, piece: bytes) -> None:
    with connected(strict, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n") as client:
        with suppress(OSError):
            client.sendall(piece)
        assert heard(client)[:12] in (b"HTTP/1.1 400", b"")


def test_silent_connections_of_one_address_keep_nobody_out(strict: Running) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(strict)) for _ in range(40)]
        for path in ("/healthz", "/readyz", "/v1/models"):
            assert httpx2.get(f"{strict.url}{path}", timeout=DEADLINE).status_code == 200
        assert all(heard(each) == b"" for each in silent[:32])
        assert len(strict.server.server_state.connections) <= 9


def test_where_all_have_a_request_under_way_only_health_is_told(strict: Running) -> None:
    watching = b"GET /api/ui/swarm/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with ExitStack() as stack:
        busy = [stack.enter_context(connected(strict, watching)) for _ in range(8)]
        assert all(each.recv(1000).startswith(b"HTTP/1.1 200") for each in busy)
        answer = httpx2.get(f"{strict.url}/v1/models", timeout=DEADLINE)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert answer.headers["connection"] == "close"
        for path in ("/healthz", "/readyz"):
            assert httpx2.get(f"{strict.url}{path}", timeout=DEADLINE).status_code == 200
    strict.wait_until(lambda: httpx2.get(f"{strict.url}/v1/models", timeout=DEADLINE).status_code == 200)


@pytest.mark.parametrize(
    "limits", [ConnectionLimits(of_one=4, proxies=("127.0.0.1",)), ConnectionLimits(in_all=4, proxies=("127.0.0.1",))], ids=["one", "all"]
)
def test_behind_a_named_proxy_only_all_connections_together_are_bounded(swarm: TinySwarm, tmp_path: Path, limits: ConnectionLimits) -> None:
    with running(swarm, tmp_path / "g.sqlite", GatewayConfig(connections=limits, drain=0.1)) as gateway, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connected(gateway))
        gateway.wait_until(lambda: len(gateway.server.server_state.connections) == (8 if limits.of_one == 4 else 4))
        assert httpx2.get(f"{gateway.url}/v1/models", timeout=DEADLINE).status_code == 200


def test_a_websocket_counts_as_a_connection(strict: Running) -> None:
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    url = strict.url.replace("http", "ws") + "/api/v2/generate"
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(url))
        with pytest.raises((WebSocketException, OSError, EOFError)), connect(url):
            pass
        assert httpx2.get(f"{strict.url}/healthz", timeout=DEADLINE).status_code == 200
