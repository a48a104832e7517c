"""Petals Chat's interface: over HTTP as forms, queries and JSON, and over a WebSocket."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.gateway.running import DEADLINE, Running, all_of

PROMPT = "What is the capital of France?"


def generate(client: httpx2.Client, **form: Any) -> str:
    answer = client.post("/api/v1/generate", data=form).json()
    assert answer["ok"], answer
    return answer["outputs"]


def test_form_query_and_json_are_the_same(client: httpx2.Client) -> None:
    options = {"inputs": PROMPT, "max_new_tokens": 6}
    by_form = client.post("/api/v1/generate", data=options)
    by_query = client.post("/api/v1/generate", params=options)
    by_json = client.post("/api/v1/generate", json=options)
    assert by_form.status_code == 200
    assert by_form.json() == by_query.json() == by_json.json()
    assert by_form.json()["ok"] is True
    assert by_form.json()["outputs"]


def test_a_session_goes_on_where_it_was(client: httpx2.Client) -> None:
    whole = generate(client, inputs=PROMPT, max_new_tokens=8)
    session = client.get("/api/v1/open_inference_session", params={"max_length": 100}).json()["session_id"]
    uuid.UUID(session)
    first = generate(client, inputs=PROMPT, max_new_tokens=3, session_id=session)
    rest = generate(client, max_new_tokens=5, session_id=session)
    assert first + rest == whole
    assert client.get("/api/v1/close_inference_session", params={"session_id": session}).json() == {"ok": True}
    gone = client.post("/api/v1/generate", data={"inputs": PROMPT, "max_new_tokens": 3, "session_id": session})
    assert (gone.status_code, gone.json()["ok"]) == (404, False)


def test_two_requests_at_once_on_one_session_queue(client: httpx2.Client, gateway: Running) -> None:
    session = client.get("/api/v1/open_inference_session", params={"max_length": 200}).json()["session_id"]
    outputs: list[str] = []

    def ask() -> None:
        with gateway.client() as other:
            outputs.append(generate(other, inputs=PROMPT, max_new_tokens=10, session_id=session))

    all_of(ask, 3)
    assert len(outputs) == 3
    tokens = gateway.gateway.sessions.get(session, "").tokens
    assert len(tokens) == 3 * (len(gateway.gateway.models.named(None).tokenizer.encode(PROMPT)) + 10)


@pytest.mark.parametrize(
    ("form", "status", "word"),
    [
        ({"inputs": PROMPT}, 422, "max_new_tokens"),
        ({"inputs": PROMPT, "max_length": 5, "max_new_tokens": 5}, 422, "max_new_tokens"),
        ({"inputs": PROMPT, "max_length": 2}, 422, "max_length"),
        ({"max_new_tokens": 5}, 422, "empty"),
        ({"inputs": PROMPT, "max_new_tokens": "many"}, 422, "max_new_tokens"),
        ({"inputs": PROMPT, "max_new_tokens": 5, "do_sample": 1, "temperature": 7}, 422, "temperature"),
        ({"inputs": "hello " * 3000, "max_new_tokens": 5}, 413, "context"),
        ({"inputs": PROMPT, "max_new_tokens": 5, "model": "other"}, 404, "other"),
        ({"inputs": PROMPT, "max_new_tokens": 5, "session_id": "other"}, 404, "session"),
    ],
)
def test_a_real_status_beside_not_ok(client: httpx2.Client, form: dict[str, Any], status: int, word: str) -> None:
    answer = client.post("/api/v1/generate", data=form)
    assert answer.status_code == status
    assert answer.json()["ok"] is False
    assert word in answer.json()["traceback"]
    assert "Traceback" not in answer.json()["traceback"]


@contextmanager
def socket(gateway: Running, **opening: Any) -> Iterator[ClientConnection]:
    """A client as the v2 protocol has it, its session opened."""
    with connect(gateway.url.replace("http", "ws") + "/api/v2/generate") as connection:
        connection.send(json.dumps({"type": "open_inference_session", **(opening or {"max_length": 200})}))
        assert json.loads(connection.recv(DEADLINE)) == {"ok": True}
        yield connection


def ask(connection: ClientConnection, **request: Any) -> list[dict[str, Any]]:
    """The replies up to the one that stops."""
    connection.send(json.dumps({"type": "generate", **request}))
    replies = [json.loads(connection.recv(DEADLINE))]
    while replies[-1]["ok"] and not replies[-1]["stop"]:
        replies.append(json.loads(connection.recv(DEADLINE)))
    return replies


def test_a_socket_gives_one_piece_without_a_stop_sequence(gateway: Running, client: httpx2.Client) -> None:
    whole = generate(client, inputs=PROMPT, max_new_tokens=8)
    with socket(gateway) as connection:
        [first] = ask(connection, inputs=PROMPT, max_new_tokens=3)
        [rest] = ask(connection, max_new_tokens=5)
    assert first["outputs"] + rest["outputs"] == whole
    assert (first["stop"], first["token_count"], rest["token_count"]) == (True, 3, 5)


def test_a_socket_streams_until_a_stop_sequence(gateway: Running, client: httpx2.Client) -> None:
    whole = generate(client, inputs=PROMPT, max_new_tokens=40)
    stop = whole[10:13]
    with socket(gateway) as connection:
        replies = ask(connection, inputs=PROMPT, max_new_tokens=1, stop_sequence=stop)
        assert len(replies) > 2
        said = "".join(reply["outputs"] for reply in replies)
        assert said == whole[: whole.index(stop)] + stop
        other = ask(connection, inputs="And of Italy?", max_new_tokens=1, stop_sequence="\x07", extra_stop_sequences=[" ", "e", "t"])
        assert other[-1]["stop"]


def test_requests_sent_ahead_are_answered_in_order(gateway: Running) -> None:
    with socket(gateway) as connection:
        for _ in range(3):
            connection.send(json.dumps({"type": "generate", "inputs": PROMPT, "max_new_tokens": 4}))
        replies = [json.loads(connection.recv(DEADLINE)) for _ in range(3)]
    assert [reply["token_count"] for reply in replies] == [4, 4, 4]


def test_too_many_requests_sent_ahead_end_the_socket(gateway: Running) -> None:
    with socket(gateway) as connection:
        for _ in range(30):
            connection.send(json.dumps({"type": "generate", "inputs": PROMPT, "max_new_tokens": 2}))
        replies = [json.loads(connection.recv(DEADLINE))]
        while replies[-1]["ok"]:
            replies.append(json.loads(connection.recv(DEADLINE)))
    assert len(replies) > 8
    assert "turn" in replies[-1]["traceback"]


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({"type": "generate", "inputs": PROMPT}, "max_new_tokens"),
        ({"type": "generate", "max_new_tokens": 3}, "empty"),
        ({"type": "open_inference_session", "max_length": 3}, "first request"),
        ({"type": "other"}, "first request"),
        ([], "JSON object"),
        ({"type": "generate", "inputs": PROMPT, "max_new_tokens": 3, "extra_stop_sequences": ["x"]}, "stop_sequence"),
    ],
)
def test_a_socket_says_what_is_wrong_and_closes(gateway: Running, request_: Any, word: str) -> None:
    with socket(gateway) as connection:
        connection.send(json.dumps(request_))
        reply = json.loads(connection.recv(DEADLINE))
        assert reply["ok"] is False
        assert word in reply["traceback"]
        assert "Traceback" not in reply["traceback"]
