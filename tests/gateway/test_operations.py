"""What those who run a gateway look at: whether it lives and is ready, its metrics, its log, its connections."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from corolla.barrier import barrier, unexpected
from corolla.errors import InvalidSetting, NetworkError, StorageError
from corolla.gateway.database import Database
from corolla.gateway.model_registry import Models, served_model
from corolla.gateway.serve import run
from corolla.gateway.service import GatewayConfig
from corolla.swarm.records import ServerRecord
from tests.gateway.running import CONTEXT, Running, TinySwarm, running

SECRET = "a-word-that-nobody-else-says"
BODY = {"prompt": SECRET, "max_tokens": 4, "temperature": 0}


def test_alive_and_ready_are_two_things(client: httpx2.Client, gateway: Running) -> None:
    assert client.get("/healthz").text == "ok\n"
    assert client.get("/readyz").json() == {"ready": True, "missing": {}, "ending": False, "faults": []}
    gateway.swarm.gone.add("first")
    try:
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["missing"]) == (503, {"tiny": ["0:2"]})
        assert answer.json()["faults"] == ["blocks 0:2 of tiny are held by no server that is ready"]
        assert client.get("/healthz").status_code == 200
    finally:
        gateway.swarm.gone.discard("first")


def test_it_is_not_ready_without_its_network_or_its_database(swarm: TinySwarm, tmp_path: Path) -> None:
    file = tmp_path / "g.sqlite"
    failed: list[str] = []
    with running(swarm, file, failure=lambda: failed[0] if failed else None) as gateway, gateway.client() as client:
        assert client.get("/readyz").status_code == 200
        failed.append("its daemon ended at /home/somebody")
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["faults"]) == (503, ["the swarm's network has failed: the gateway's log says more"])
        failed.clear()
        with closing(sqlite3.connect(file)) as other:
            other.execute("BEGIN IMMEDIATE")
            gateway.wait_until(lambda: client.get("/readyz").json()["faults"] == ["the database does not answer"])
            other.rollback()
        gateway.wait_until(lambda: client.get("/readyz").status_code == 200)


def test_a_gateway_whose_network_failed_ends_and_says_so(swarm: TinySwarm, tmp_path: Path) -> None:
    failed: list[str] = []
    model = served_model("tiny", swarm.directory, swarm.transport, "any", CONTEXT, swarm.records, failure=lambda: "".join(failed) or None)
    with closing(Database(str(tmp_path / "g.sqlite"))) as database, pytest.raises(NetworkError, match="its daemon ended"):
        # Ready, and a moment later dead.
        run(Models([model]), database, GatewayConfig(drain=0.1), "127.0.0.1", 0, lambda url: failed.append("its daemon ended"))


def test_an_error_that_nobody_expected_is_logged_once_counted_and_tells_nothing(
    swarm: TinySwarm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def records() -> list[ServerRecord]:
        raise AssertionError(SECRET)

    with running(swarm, tmp_path / "g.sqlite", records=records) as gateway, gateway.client() as client:
        before = unexpected["a request"]
        answer = client.get("/api/ui/swarm")
        assert (answer.status_code, answer.json()["error"]["kind"]) == (500, "Fault")
        assert SECRET not in answer.text
        gateway.wait_until(lambda: bool([record for record in caplog.records if record.exc_info]))
        assert unexpected["a request"] == before + 1
        with client.stream("GET", "/api/ui/swarm/events") as stream, pytest.raises(httpx2.RemoteProtocolError):
            stream.read()
        assert client.get("/healthz").status_code == 200
        gateway.wait_until(lambda: unexpected["a request"] == before + 2)
    assert len([record for record in caplog.records if record.exc_info]) == 2


def test_metrics_show_what_barriers_caught(client: httpx2.Client) -> None:
    with barrier("a test's"):
        raise KeyError
    assert figures(client)['corolla_unexpected_errors_total{barrier="a test\'s"}'] == unexpected["a test's"]


def figures(client: httpx2.Client) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_count_what_was_answered(client: httpx2.Client) -> None:
    before = figures(client)
    assert client.post("/v1/completions", json=BODY).status_code == 200
    assert client.post("/v1/completions", json={**BODY, "temperature": 9}).status_code == 422
    after = figures(client)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('corolla_tokens_total{model="tiny"}') == 4
    assert grown('corolla_answers_total{end="length",model="tiny"}') == 1
    assert grown('corolla_errors_total{kind="InvalidSetting"}') == 1
    for name in ("first_token", "between_tokens", "queue"):
        assert grown(f'corolla_{name}_seconds_count{{model="tiny"}}') == 1
    assert {"corolla_streams", "corolla_waiting", "corolla_sessions", "corolla_blocks_missing"} <= set(after)


def test_the_access_log_has_no_word_of_what_was_said(client: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.post("/v1/completions", json=BODY, params={"q": SECRET})
        client.post("/api/v1/generate", params={"inputs": SECRET, "max_new_tokens": 2})
        conversation = client.post("/api/ui/conversations", json={"title": SECRET, "system": SECRET}).json()["id"]
        client.get("/api/ui/conversations", params={"query": SECRET})
        client.get(f"/api/ui/conversations/{conversation}")
    lines = [record for record in caplog.records if record.name == "corolla.access"]
    assert [(line.method, line.path, line.status) for line in lines][:2] == [  # type: ignore[attr-defined]
        ("POST", "/v1/completions", 200),
        ("POST", "/api/v1/generate", 200),
    ]
    assert not [record for record in caplog.records if record.name.startswith("corolla") and SECRET in repr(record.__dict__)]


def test_only_a_debugging_gateway_shows_tracebacks(swarm: TinySwarm, client: httpx2.Client, tmp_path: Path) -> None:
    wrong = {"inputs": "x", "max_new_tokens": 1, "model": "other"}
    with running(swarm, tmp_path / "g.sqlite", GatewayConfig(debug=True, drain=0.5)) as gateway, gateway.client() as debugging:
        assert "Traceback (most recent call last)" in debugging.post("/api/v1/generate", data=wrong).json()["traceback"]
    assert "Traceback" not in client.post("/api/v1/generate", data=wrong).json()["traceback"]


@pytest.mark.parametrize("url", ["nosuch://", "postgresql+nosuch://x/y", "://"])
def test_a_database_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match="database"):
        Database(url)


def test_a_damaged_database_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "g.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match=r"g\.sqlite"):
        Database(str(tmp_path / "g.sqlite"))
