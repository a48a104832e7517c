"""Two models behind one gateway: each request goes to the one that it names."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.gateway.running import Running, TinySwarm, all_of, make_model, running
from tests.gateway.test_conversations import ask, new

BODY = {"prompt": "What is the capital of France?", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def both(swarm: TinySwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """ "tiny", the first, and "wide", of other weights; each has servers of its own."""
    wide = TinySwarm(make_model(tmp_path_factory.mktemp("wide"), intermediate_size=96))
    try:
        with running(swarm, tmp_path_factory.mktemp("both") / "g.sqlite", others={"wide": wide}) as gateway:
            yield gateway
    finally:
        wide.close()


@pytest.fixture
def at_both(both: Running) -> Iterator[httpx2.Client]:
    with both.client() as client:
        yield client


def text(client: httpx2.Client, **more: Any) -> str:
    return str(client.post("/v1/completions", json={**BODY, **more}).json()["choices"][0]["text"])


def test_each_answers_as_itself(at_both: httpx2.Client) -> None:
    assert [model["id"] for model in at_both.get("/v1/models").json()["data"]] == ["tiny", "wide"]
    assert text(at_both, model="tiny") == text(at_both) != text(at_both, model="wide")
    petals = at_both.post("/api/v1/generate", data={"inputs": BODY["prompt"], "max_new_tokens": 8, "model": "wide"}).json()
    assert petals["outputs"] == text(at_both, model="wide")
    assert [model["id"] for model in at_both.get("/api/ui/state").json()["models"]] == ["tiny", "wide"]
    assert [model["id"] for model in at_both.get("/api/ui/swarm").json()["models"]] == ["tiny", "wide"]


def test_at_once(both: Running, at_both: httpx2.Client) -> None:
    expected = {model: text(at_both, model=model) for model in ("tiny", "wide")}
    found: list[tuple[str, str]] = []
    turn = threading.Lock()
    names = iter(["tiny", "wide"] * 6)

    def one() -> None:
        with turn:
            model = next(names)
        with both.client() as client:
            found.append((model, text(client, model=model)))

    all_of(one, 12)
    assert len(found) == 12
    assert set(found) == set(expected.items())


def test_a_conversation_changes_its_model(at_both: httpx2.Client) -> None:
    conversation = new(at_both, model="wide")
    first = ask(at_both, conversation, "hello there")
    assert at_both.patch(f"/api/ui/conversations/{conversation}", json={"model": "tiny"}).json()["model"] == "tiny"
    assert ask(at_both, conversation, "hello there", parent=None)["text"] != first["text"]


def test_one_that_lacks_blocks_does_not_hide_the_other(both: Running, at_both: httpx2.Client) -> None:
    assert at_both.get("/readyz").status_code == 200
    both.swarm.gone.add("last")
    try:
        answer = at_both.get("/readyz")
        assert (answer.status_code, answer.json()["missing"]) == (503, {"tiny": ["2:4"]})
        assert text(at_both, model="wide")
    finally:
        both.swarm.gone.discard("last")
