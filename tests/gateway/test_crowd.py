"""More clients than there is room for, and clients that are slow, silent or gone."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from websockets.sync.client import connect

from corolla.gateway.fair_queue import QueueConfig
from corolla.gateway.middleware import AccessConfig
from corolla.gateway.pool import PoolConfig
from corolla.gateway.service import GatewayConfig
from tests.gateway.running import DEADLINE, Running, TinySwarm, all_of, running

STREAMS, WAITING = 4, 6
LONG = {"model": "tiny", "prompt": "What is the capital of France?", "max_tokens": 400, "temperature": 0, "stream": True, "seed": 1}


@pytest.fixture(scope="module")
def small(swarm: TinySwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with few places, that keeps no session and has little patience."""
    config = GatewayConfig(
        access=AccessConfig(body=100_000, read=1.0, write=2.0),
        queue=QueueConfig(streams=STREAMS, waiting=WAITING, waiting_of_one=WAITING),
        pool=PoolConfig(idle=0),
        drain=0.5,
        keep_alive=0.05,
        first_token=0.2,
    )
    with running(swarm, tmp_path_factory.mktemp("small") / "g.sqlite", config) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def nothing_is_left(small: Running) -> Iterator[None]:
    yield
    small.wait_until(lambda: small.gateway.queue.active == small.gateway.queue.waiting == 0)
    small.wait_until(lambda: not small.gateway.tasks.under_way)


def test_ten_times_the_capacity(small: Running) -> None:
    answers: list[httpx2.Response] = []

    def ask() -> None:
        with small.client() as client:
            answers.append(client.post("/v1/completions", json={**LONG, "stream": False, "max_tokens": 20}))

    all_of(ask, 10 * (STREAMS + WAITING))
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) <= {200, 429}
    assert counts[200] >= STREAMS + WAITING
    assert counts[429] > 0
    assert len({answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}) == 1
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(small: Running, stream: bool) -> None:
    small.wait_until(lambda: not any(engine.active for engine in small.swarm.engines.values()))
    before = small.swarm.pages_in_use
    body = json.dumps({**LONG, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", httpx2.URL(small.url).port or 0), timeout=DEADLINE) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        small.wait_until(lambda: small.swarm.engines["last"].active > 0)
    small.wait_until(lambda: small.swarm.pages_in_use <= before)


def test_one_that_waits_and_goes_away_leaves_the_queue(small: Running) -> None:
    streams = [small.client() for _ in range(STREAMS)]
    entered = [client.stream("POST", "/v1/completions", json=LONG) for client in streams]
    for each in entered:
        each.__enter__()
    waiting = small.client()
    with pytest.raises(httpx2.ReadTimeout):
        waiting.post("/v1/completions", json=LONG | {"stream": False}, timeout=0.3)
    small.wait_until(lambda: small.gateway.queue.waiting == 0)
    for each in entered:
        each.__exit__(None, None, None)
    for client in [*streams, waiting]:
        client.close()


def test_a_reader_that_takes_nothing_holds_no_place(small: Running) -> None:
    body = json.dumps({**LONG, "logprobs": 20, "n": 4}).encode()
    with socket.create_connection(("127.0.0.1", httpx2.URL(small.url).port or 0), timeout=DEADLINE) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        small.wait_until(lambda: small.gateway.queue.active > 0)
        small.wait_until(lambda: small.gateway.queue.active == 0)


def test_a_writer_that_is_slow_or_says_too_much_is_refused(small: Running) -> None:
    with socket.create_connection(("127.0.0.1", httpx2.URL(small.url).port or 0), timeout=DEADLINE) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    with small.client() as client:
        assert client.post("/v1/completions", content=b"x" * 200_000).status_code == 413
        assert client.post("/v1/completions", content=iter([b"x" * 60_000] * 3)).status_code == 413


def test_a_silent_stream_is_kept_alive(small: Running, swarm: TinySwarm) -> None:
    """As during a long prefill: the first server computes nothing until a sign of life has come."""
    chat = _chat(5)
    with swarm.held("first") as release, small.client() as client, client.stream("POST", "/v1/chat/completions", json=chat) as stream:
        lines = stream.iter_lines()
        assert any(line.startswith(": ") for line in lines)
        release()
        assert "data: [DONE]" in list(lines)


def _chat(tokens: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": tokens, "temperature": 0, "stream": True}


def test_a_socket_that_goes_away_ends_its_answer(small: Running) -> None:
    with connect(small.url.replace("http", "ws") + "/api/v2/generate") as connection:
        connection.send(json.dumps({"type": "open_inference_session", "max_length": 500}))
        connection.recv(DEADLINE)
        connection.send(json.dumps({"type": "generate", "inputs": "hello", "max_new_tokens": 1, "stop_sequence": "\x07\x07"}))
        connection.recv(DEADLINE)
    small.wait_until(lambda: small.gateway.queue.active == 0)


def test_an_answer_goes_on_when_a_server_dies_and_says_so(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    swarm = TinySwarm(tiny_model, {"first": (0, 2), "last": (2, 4), "spare": (2, 4)})
    request.addfinalizer(swarm.close)
    settings = {"settings": {"max_tokens_to_generate": 120, "do_sample": False}}
    with running(swarm, tmp_path / "g.sqlite") as gateway, gateway.client() as client:

        def story(kill: bool) -> dict:
            conversation = client.post("/api/ui/conversations", json=settings).json()["id"]
            answer = client.post(f"/api/ui/conversations/{conversation}/messages", json={"text": "hello there"}).json()["answer"]["id"]
            with client.stream("GET", f"/api/ui/messages/{answer}/events") as stream:
                for number, line in enumerate(stream.iter_lines()):
                    if number == 15 and kill:
                        swarm.kill("last")
                    if line.startswith('data: {"message"'):
                        return dict(json.loads(line.removeprefix("data: "))["message"])
            raise AssertionError

        undisturbed = story(kill=False)
        disturbed = story(kill=True)
    assert disturbed["text"] == undisturbed["text"]
    assert disturbed["state"] == "done"
    assert disturbed["notices"] == ["A server was lost; the answer goes on with others."]
