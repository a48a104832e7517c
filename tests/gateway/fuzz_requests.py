"""Odd requests to every interface of a gateway: `python -m tests.gateway.fuzz_requests [COUNT] [SEED]`.

Each is answered, and none with a fault of the gateway or of a server; memory stays bounded, and after every 1,000 of them a known
question has its known answer.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlencode

import psutil
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from corolla.barrier import unexpected
from corolla.gateway.service import GatewayConfig
from tests.gateway.running import DEADLINE, Running, TinySwarm, make_model, running

JSON = {"Content-Type": "application/json"}
MOST_GROWTH = 400 * 2**20  # bytes of memory, engines included
ALLOWED = (200, 201, 202, 204, 400, 401, 403, 404, 405, 408, 409, 411, 413, 414, 415, 416, 422, 429, 431)

# Values as they stand in JSON.
NUMBERS = [
    "1" + "0" * 5000,
    *("0", "-0.0", "1", "-1", "2", "0.5", "1e-39", "5e-324", "1e-400", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1.0", "16"),
    *(str(each) for each in (2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400)),
]
TEXTS = [
    *(
        '""',
        '" "',
        '"hello"',
        '"%"',
        '"\\u0000"',
        '"a\\u0000b"',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\ud83d\\ude42"',
        '"\\u202e"',
        '"\'; --"',
    ),
    *('"../../etc/passwd"', '"</s><s>"', '"<|im_end|>"', '"tiny"', '"tokenizer"', '"{{ 1 / 0 }}"', '"\xff"', '"' + "a" * 70_000 + '"'),
    '"' + "\\n" * 30_000 + '"',
]
OTHERS = [
    *("null", "true", "false", "[]", "{}", "[[]]", '{"": null}', "[null]", '{"a": 1, "a": 2}', "[" * 5000, "[" * 900 + "]" * 900),
    *('{"a":' * 900 + "1" + "}" * 900, "[0]", "[-1]", "[99999999]", '["hello", "there"]', "[[1, 2], [3]]", "nul", "'x'", "[1,]"),
    "[" + ",".join("1" * 3000) + "]",
]

MESSAGES = [
    '[{"role": "user", "content": %s}]',
    '[{"role": %s, "content": "hi"}]',
    '[{"role": "assistant", "content": %s}, {"role": "user", "content": [{"type": "text", "text": %s}]}]',
    '[{"role": "system", "content": %s}]',
]
SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
)
PETALS = (
    "inputs",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_length",
    "max_new_tokens",
    "session_id",
    "model",
)
SETTINGS = ("max_tokens_to_generate", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "top_logprobs", "seed")
BODIES = {
    "/v1/completions": ("prompt", "echo", "model", "best_of", "suffix", "logit_bias", "soft_prompt", *SAMPLING),
    "/v1/chat/completions": (
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "template",
        "tools",
        "response_format",
        "model",
        *SAMPLING,
    ),
    "/api/v1/generate": PETALS,
    "/api/ui/complete": ("text", "tokens", "prompt", "settings", "model"),
    "/api/ui/conversations": ("title", "model", "system", "template", "prompt", "settings", "text"),
    "/api/ui/conversations/import": ("title", "messages", "settings", "leaf", "system", "template"),
    "/api/ui/conversations/ID": ("title", "leaf", "settings", "template"),
    "/api/ui/conversations/ID/messages": ("text", "parent"),
    "/api/ui/messages/ID/regenerate": (),
    "/api/ui/messages/ID/resume": (),
    "/api/ui/messages/ID/stop": (),
    "/api/ui/login": ("key",),
    "/api/ui/logout": (),
}
READ = (
    *("/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny", "/v1/models/", "/api/ui/state", "/nothing"),
    *("/api/ui/conversations", "/api/ui/conversations/ID", "/api/ui/conversations/ID/export", "/api/ui/swarm", "/api/ui/tuning"),
    *("/api/v1/open_inference_session", "/api/v1/close_inference_session", "/api/ui/messages/ID/events", "/assets/x", "/c/ID", "/../../x"),
)
QUERIES = ("max_length", "session_id", "query", "limit", "before", "model", "inputs", "max_new_tokens", "temperature")
HEADERS = ("Host", "Origin", "Cookie", "Authorization", "Content-Type", "Accept", "Sec-Fetch-Site", "Expect", "Range", "X-Forwarded-For")
VALUES = (
    *("", "x", "null", "http://[", "[::1", "localhost", "a" * 9000, "application/json", "text/plain; charset=\xff", "multipart/form-data"),
    *("multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/json; charset=utf-16", "Bearer " + "k" * 9000),
    *("corolla_login=;;=,", 'corolla_login="\\', "100-continue", "bytes=0-,9-1", "\xe9", "*/*", "1, 2, 3"),
)


class Fuzzer:
    """Requests to one gateway, each drawn from `draw`; `ids` are of things that there are."""

    def __init__(self, gateway: Running, seed: int) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._gateway = gateway
        self._draw = random.Random(seed)
        self._port = int(gateway.url.rpartition(":")[2])
        self._ids = ["", "x", "%00", "%ff", "a" * 300, "%2e%2e%2f"]

    def one(self) -> None:
        """One request, answered. Raises `AssertionError`."""
        kinds: list[tuple[Callable[[], None], int]] = [(self._post, 60), (self._get, 25), (self._socket, 5), (self._raw, 10)]
        [work] = self._draw.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
        work()

    def known(self) -> str:
        """The answer to a question that is always the same."""
        asked = b'{"prompt": "hello there", "max_tokens": 12, "temperature": 1, "seed": 7}'
        status, body = self._ask("POST", "/v1/completions", asked, JSON)
        assert status == 200, body
        return str(json.loads(body)["choices"][0]["text"])

    def _value(self) -> str:
        return self._draw.choice(self._draw.choice((NUMBERS, TEXTS, OTHERS)))

    def _field(self, name: str) -> str:
        draw = self._draw
        if name == "messages" and draw.random() < 0.8:
            return draw.choice(MESSAGES).replace("%s", draw.choice(TEXTS))
        if name == "settings" and draw.random() < 0.8:
            return "{" + ", ".join(f'"{each}": {self._value()}' for each in draw.sample(SETTINGS, draw.randrange(1, 4))) + "}"
        if name in ("prompt", "text", "inputs") and draw.random() < 0.8:
            return draw.choice(TEXTS)
        if name in ("max_tokens", "max_new_tokens") and draw.random() < 0.7:
            return "3"
        return self._value()

    def _post(self) -> None:
        draw = self._draw
        path = draw.choice(list(BODIES))
        names = BODIES[path]
        chosen = [
            *names[:1],
            *draw.sample(names, draw.randrange(min(4, len(names)) + 1)),
            *draw.sample(names, draw.randrange(2) if names else 0),
        ]
        body = "{" + ", ".join(f'"{name}": {self._field(name)}' for name in chosen) + "}"
        kind = "application/json"
        if draw.random() < 0.1:
            body = self._value()
        elif path == "/api/v1/generate" and draw.random() < 0.4:
            kind = "application/x-www-form-urlencoded"
            body = urlencode({name: self._field(name).strip('"') for name in chosen}, errors="replace")
        elif draw.random() < 0.02:
            body = '{"prompt": "' + "a" * 10_000_000 + '"}'
        method = "PATCH" if path.endswith("/ID") else draw.choices(("POST", "PUT", "DELETE", "OPTIONS"), (30, 1, 1, 1))[0]
        self._answered(method, path, body.encode("utf-8", "surrogatepass"), {"Content-Type": kind})

    def _get(self) -> None:
        draw = self._draw
        path = draw.choice(READ)
        if draw.random() < 0.7:
            query = {name: self._value().strip('"')[:3000] for name in draw.sample(QUERIES, draw.randrange(1, 4))}
            path += "?" + (
                urlencode(query, errors="replace") if draw.random() < 0.8 else "&".join(f"{k}=%ff%{v[:2]}" for k, v in query.items())
            )
        self._answered(draw.choices(("GET", "HEAD", "OPTIONS"), (20, 1, 1))[0], re.sub(r"[^!-~]", "", path), None, {})

    def _answered(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> None:
        draw = self._draw
        headers = {**headers, **{draw.choice(HEADERS): draw.choice(VALUES) for _ in range(draw.choice((0, 0, 0, 1, 2)))}}
        path = path.replace("ID", quote(draw.choice(self._ids), safe="%"))
        status, answer = self._ask(method, path, body, headers)
        self.statuses[status] += 1
        assert status in ALLOWED, (method, path, (body or b"")[:500], headers, status, answer[:500])
        with suppress(ValueError, TypeError, AttributeError):
            made = json.loads(answer)
            found = [made.get("id"), made.get("session_id"), (made.get("answer") or {}).get("id")]
            self._ids = [*self._ids[:6], *[each for each in (*self._ids[6:], *found) if each][-20:]]

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
            for name, value in {"Content-Length": str(len(body or b"")), **headers}.items():
                connection.putheader(name, value.encode("latin-1"))
            connection.endheaders()
            with suppress(BrokenPipeError, ConnectionResetError):  # it may be refused before all of it was sent
                connection.send(body or b"")
            response = connection.getresponse()
            streams = response.headers.get_content_type() == "text/event-stream"
            return response.status, response.read(200) if streams else response.read()
        except (ConnectionResetError, BrokenPipeError):
            return 413, b""  # it was closed at once, for its size
        finally:
            connection.close()

    def _socket(self) -> None:
        draw = self._draw
        with (
            suppress(WebSocketException, OSError, EOFError),
            connect(f"ws://127.0.0.1:{self._port}/api/v2/generate", open_timeout=DEADLINE, close_timeout=DEADLINE, max_size=None) as client,
        ):
            client.send(f'{{"type": "open_inference_session", "max_length": {draw.choice(("64", self._value()))}}}')
            names = draw.sample((*PETALS, "stop_sequence", "extra_stop_sequences"), 4)
            body = '{"type": "generate", ' + ", ".join(f'"{name}": {self._field(name)}' for name in names) + "}"
            client.send(body if draw.random() < 0.9 else body.encode("utf-8", "surrogatepass"))
            for _ in range(2):
                self.statuses["socket"] += 1
                said = json.loads(client.recv(DEADLINE))
                assert "a fault" not in said.get("traceback", ""), (body, said)

    def _raw(self) -> None:
        draw = self._draw
        line = draw.choice(
            (
                b"GET / HTTP/1.1\r\n",
                b"GET http://[ HTTP/1.1\r\nHost: x\r\n",
                b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n",
                b"GET /%zz%00%ff HTTP/1.0\r\n",
                b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n",
                b"GET /healthz HTTP/9.9\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n",
                draw.randbytes(40),
            )
        )
        with socket.create_connection(("127.0.0.1", self._port), timeout=DEADLINE) as client, suppress(ConnectionError):
            client.sendall(line + b"Connection: close\r\n\r\n" + draw.randbytes(draw.randrange(30)))
            client.shutdown(socket.SHUT_WR)
            heard = client.recv(65536)
            self.statuses["raw"] += 1
            assert not heard.startswith(b"HTTP/1.1 5"), (line, heard)


def fuzz(gateway: Running, count: int, seed: int, *, every: int = 1000, tell: Callable[[str], None] = lambda _: None) -> Counter[int | str]:
    """`count` requests; returns their statuses. Raises `AssertionError`."""
    fuzzer = Fuzzer(gateway, seed)
    right, before = fuzzer.known(), Counter(unexpected)
    process = psutil.Process()
    memory = 0
    for number in range(1, count + 1):
        fuzzer.one()
        if number % every == 0 or number == count:
            assert fuzzer.known() == right
            assert Counter(unexpected) == before, unexpected - before
            memory = memory or process.memory_info().rss  # once everything was used
            assert process.memory_info().rss < memory + MOST_GROWTH
            tell(f"{number} requests, {process.memory_info().rss / 2**20:.0f} MiB: {dict(fuzzer.statuses)}")
    return fuzzer.statuses


def main() -> None:
    given = [int(argument) for argument in sys.argv[1:3]]
    count, seed = (*given, *(10_000, 0)[len(given) :])
    with tempfile.TemporaryDirectory() as folder:
        swarm = TinySwarm(make_model(Path(folder) / "model"))
        with running(swarm, Path(folder) / "gateway.sqlite", GatewayConfig(drain=0.5)) as gateway:
            fuzz(gateway, count, seed, tell=print)
        swarm.close()
    print(f"{count} requests: no fault, no hang, memory bounded, the known answer right")


if __name__ == "__main__":
    main()
