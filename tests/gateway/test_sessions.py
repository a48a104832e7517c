"""Sessions of Petals' interface outlive idle times and lost servers: what they hold is their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.gateway.running import TinySwarm, running

PROMPT = "What is the capital of France?"


def generate(client: httpx2.Client, **form: Any) -> str:
    answer = client.post("/api/v1/generate", data=form).json()
    assert answer["ok"], answer
    return str(answer["outputs"])


def opened(client: httpx2.Client) -> str:
    return str(client.get("/api/v1/open_inference_session", params={"max_length": 300}).json()["session_id"])


def test_a_session_goes_on_after_its_server_was_lost(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    swarm = TinySwarm(tiny_model, {"first": (0, 2), "last": (2, 4), "spare": (2, 4)})
    request.addfinalizer(swarm.close)
    with running(swarm, tmp_path / "g.sqlite") as gateway, gateway.client() as client:
        whole = generate(client, inputs=PROMPT, max_new_tokens=12)
        session = opened(client)
        first = generate(client, inputs=PROMPT, max_new_tokens=6, session_id=session)
        swarm.kill("last")
        assert first + generate(client, max_new_tokens=6, session_id=session) == whole


def test_a_session_goes_on_after_others_took_its_room(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    swarm = TinySwarm(tiny_model, cache_tokens=512)
    request.addfinalizer(swarm.close)
    with running(swarm, tmp_path / "g.sqlite") as gateway, gateway.client() as client:
        session = opened(client)
        first = generate(client, inputs=PROMPT, max_new_tokens=6, session_id=session)
        for number in range(12):
            generate(client, inputs=f"{number} {PROMPT} " * 8, max_new_tokens=4, session_id=opened(client))
        rest = generate(client, max_new_tokens=6, session_id=session)
        assert sum(engine.counters.evicted_idle for engine in swarm.engines.values()) > 0
        assert first + rest == generate(client, inputs=PROMPT, max_new_tokens=12)
