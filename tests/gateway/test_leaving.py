"""A client may leave at any moment: its answer ends, and the log has no traceback of it."""

from __future__ import annotations

import json
import logging
import socket
import struct
from contextlib import suppress

import httpx2
import pytest

from tests.gateway.running import DEADLINE, Running

LONG = {"prompt": "hello there", "max_tokens": 400, "temperature": 0}


def posted(path: str, body: object, length: int = 0) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content) + length}\r\n\r\n"
    return head.encode() + content


UPGRADE = (
    b"GET /api/v2/generate HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def frame(message: object) -> bytes:
    payload = json.dumps(message).encode()
    return b"\x81" + bytes([0x80 | 126]) + struct.pack("!H", len(payload)) + bytes(4) + payload  # a mask of zeros


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HT",
        posted("/v1/completions", LONG),
        posted("/v1/completions", {**LONG, "stream": True, "n": 3}),
        posted("/v1/completions", LONG, length=1000),
        posted("/api/v1/generate", {"inputs": "hello", "max_new_tokens": 400}),
        posted("/api/v1/generate", {"inputs": "hello", "max_new_tokens": 400}, length=10),
        posted("/api/ui/complete", {"text": "hello", "settings": {"max_tokens_to_generate": 400}}),
        posted("/api/ui/conversations", {"text": "hello", "settings": {"max_tokens_to_generate": 20}}),
        b"GET /api/ui/swarm/events HTTP/1.1\r\nHost: localhost\r\n\r\n",
        UPGRADE,
        UPGRADE + frame({"type": "open_inference_session", "max_length": 400}),
        UPGRADE
        + frame({"type": "open_inference_session", "max_length": 400})
        + frame({"type": "generate", "inputs": "hi", "max_length": 300}),
        UPGRADE + frame({"type": "nothing"}),
        UPGRADE + b"\x83\xff\xff",
    ],
    ids=range(15),
)
@pytest.mark.parametrize("abruptly", [False, True])
@pytest.mark.parametrize("hears", [False, True])
def test_a_client_that_leaves_leaves_no_traceback(
    gateway: Running, caplog: pytest.LogCaptureFixture, sent: bytes, abruptly: bool, hears: bool
) -> None:
    with socket.create_connection(("127.0.0.1", httpx2.URL(gateway.url).port or 0), timeout=0.2) as client:
        client.sendall(sent)
        if hears:
            with suppress(TimeoutError):
                client.recv(200)
        if abruptly:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gateway.wait_until(lambda: not gateway.server.server_state.connections and not gateway.gateway.tasks.under_way, DEADLINE)
    httpx2.get(f"{gateway.url}/healthz")
    assert [record.getMessage() for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []
