"""Conversations of many megabytes, searched, imported and read: others are answered meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from tests.gateway.running import DEADLINE, Running, all_of

MESSAGES = 9000
WORST = 0.9  # seconds
MOST_OF_IT = 0.6


@contextmanager
def watched(gateway: Running) -> Iterator[None]:
    """/healthz is asked again and again, and answered at once; on a machine that is busy with others, in a part of the block's time."""
    took: list[float] = [0.0]
    entered = time.monotonic()
    over = threading.Event()

    def look() -> None:
        with httpx2.Client(base_url=gateway.url, timeout=DEADLINE) as client:
            while not over.is_set():
                began = time.monotonic()
                client.get("/healthz")
                took.append(time.monotonic() - began)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(DEADLINE)
    assert max(took) < max(WORST, (time.monotonic() - entered) * MOST_OF_IT)


@pytest.fixture(scope="module")
def large(gateway: Running) -> str:
    """The id of an imported conversation of 30 MB."""
    messages = [
        {
            "id": f"m{number}",
            "parent": f"m{number - 1}" if number else None,
            "role": "assistant" if number % 2 else "user",
            "text": "x" * 3300,
            "notices": ["n"] * 10,
        }
        for number in range(MESSAGES)
    ]
    body = json.dumps({"title": "large", "messages": messages, "settings": {"max_tokens_to_generate": 2}}).encode()
    assert len(body) > 29 * 2**20
    with watched(gateway), gateway.client() as client:
        answer = client.post("/api/ui/conversations/import", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201, answer.text[:500]
    assert len(answer.json()["messages"]) == MESSAGES
    return str(answer.json()["id"])


def test_a_large_conversation_is_read_while_others_are_answered(gateway: Running, client: httpx2.Client, large: str) -> None:
    with watched(gateway):
        whole = client.get(f"/api/ui/conversations/{large}")
        exported = client.get(f"/api/ui/conversations/{large}/export")
        all_of(lambda: httpx2.get(f"{gateway.url}/api/ui/conversations/{large}", timeout=DEADLINE), 6)
    assert [len(message["text"]) for message in whole.json()["messages"]] == [3300] * MESSAGES
    assert exported.json() == whole.json()


def test_a_large_conversation_goes_on(gateway: Running, client: httpx2.Client, large: str) -> None:
    with watched(gateway):
        asked = client.post(f"/api/ui/conversations/{large}/messages", json={"text": "hello"})
        assert asked.status_code == 202, asked.text
        with client.stream("GET", f"/api/ui/messages/{asked.json()['answer']['id']}/events") as stream:
            assert '"state":"done"' in list(stream.iter_lines())[-2]


def test_searches_of_one_keep_nobody_waiting(gateway: Running, client: httpx2.Client, large: str) -> None:
    seen: list[int] = []

    def search() -> None:
        seen.append(httpx2.get(f"{gateway.url}/api/ui/conversations", params={"query": "zzzz%q"}, timeout=DEADLINE).status_code)

    with watched(gateway):
        searching = threading.Thread(target=all_of, args=(search, 40))
        searching.start()
        gateway.wait_until(lambda: gateway.gateway.conversations.searches > 0)
        assert client.get("/api/ui/conversations").status_code == 200
        assert searching.is_alive()
        searching.join(DEADLINE)
    assert set(seen) == {200, 429}
    assert client.get("/api/ui/conversations", params={"query": "xxx"}).json()["conversations"][0]["id"] == large
