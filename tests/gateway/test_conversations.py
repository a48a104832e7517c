"""Conversations on the page: a tree, search, export, answers that nobody looks at, and restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.gateway.running import TinySwarm, running

SHORT = {"max_tokens_to_generate": 6, "do_sample": False}


def events(client: httpx2.Client, message: str) -> list[tuple[str, dict[str, Any]]]:
    """All of a message's events, until the last one."""
    found = []
    with client.stream("GET", f"/api/ui/messages/{message}/events") as stream:
        kind = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((kind, json.loads(line.removeprefix("data: "))))
    return found


def new(client: httpx2.Client, **options: Any) -> str:
    return str(client.post("/api/ui/conversations", json={"settings": SHORT, **options}).json()["id"])


def ask(client: httpx2.Client, conversation: str, text: str, **more: Any) -> dict[str, Any]:
    """The finished answer."""
    answer = client.post(f"/api/ui/conversations/{conversation}/messages", json={"text": text, **more})
    assert answer.status_code == 202, answer.text
    last = events(client, answer.json()["answer"]["id"])[-1]
    assert last[0] == "done"
    return dict(last[1]["message"])


def test_an_answer_comes_as_events_and_is_kept(client: httpx2.Client) -> None:
    conversation = new(client)
    made = client.post(f"/api/ui/conversations/{conversation}/messages", json={"text": "What is the capital of France?"}).json()
    heard = events(client, made["answer"]["id"])
    assert heard[0][0] == "snapshot"
    text = heard[0][1]["text"] + "".join(data["text"] for kind, data in heard if kind == "delta")
    done = heard[-1][1]["message"]
    assert (done["text"], done["state"], done["finish"], done["stats"]["tokens"]) == (text, "done", "length", 6)
    kept = client.get(f"/api/ui/conversations/{conversation}").json()
    assert [message["text"] for message in kept["messages"]] == ["What is the capital of France?", text]
    assert kept["title"] == "What is the capital of France?"
    assert kept["leaf"] == done["id"]
    assert events(client, done["id"])[-1][1]["message"]["text"] == text


def test_a_conversation_may_begin_with_its_question(client: httpx2.Client) -> None:
    made = client.post("/api/ui/conversations", json={"settings": SHORT, "text": "hello there"})
    assert made.status_code == 201
    assert made.json()["title"] == "hello there"
    assert made.json()["leaf"] == made.json()["answer"]["id"]
    done = events(client, made.json()["answer"]["id"])[-1][1]["message"]
    assert done["text"] == ask(client, new(client), "hello there")["text"]
    before = client.get("/api/ui/conversations").json()["conversations"]
    for text, status in ((" ", 422), ("x" * 100_000, 413)):
        assert client.post("/api/ui/conversations", json={"text": text}).status_code == status
    assert client.get("/api/ui/conversations").json()["conversations"] == before


def test_edits_and_regenerations_are_branches(client: httpx2.Client) -> None:
    conversation = new(client)
    first = ask(client, conversation, "hello there")
    second = ask(client, conversation, "fine, and you?")
    edited = ask(client, conversation, "fine, thank you!", parent=first["id"])
    beginning = ask(client, conversation, "What is the capital of Italy?", parent=None)
    again = client.post(f"/api/ui/messages/{second['id']}/regenerate", json={}).json()["answer"]
    assert again["parent"] == second["parent"]
    events(client, again["id"])
    messages = {message["id"]: message for message in client.get(f"/api/ui/conversations/{conversation}").json()["messages"]}
    assert len(messages) == 9
    assert messages[second["parent"]]["parent"] == messages[edited["parent"]]["parent"] == first["id"]
    assert messages[beginning["parent"]]["parent"] is None
    changed = client.patch(f"/api/ui/conversations/{conversation}", json={"leaf": second["id"]}).json()
    assert changed["leaf"] == second["id"]
    assert client.patch(f"/api/ui/conversations/{conversation}", json={"leaf": "other"}).status_code == 404


def test_the_same_question_with_the_same_history_has_the_same_answer(client: httpx2.Client) -> None:
    one, other = new(client), new(client)
    for conversation in (one, other):
        ask(client, conversation, "hello there")
    assert ask(client, one, "and of Italy?")["text"] == ask(client, other, "and of Italy?")["text"]


def test_an_answer_is_stopped_and_goes_on(client: httpx2.Client, swarm: TinySwarm) -> None:
    long = {"max_tokens_to_generate": 150, "do_sample": False}
    conversation = new(client, settings=long)
    answer = client.post(f"/api/ui/conversations/{conversation}/messages", json={"text": "hello there"}).json()["answer"]["id"]
    with client.stream("GET", f"/api/ui/messages/{answer}/events") as stream:
        for line in stream.iter_lines():
            if line == "event: delta":
                break
        with swarm.held("last"):  # so that it is not done before it is stopped
            assert client.post(f"/api/ui/messages/{answer}/stop", json={}).status_code == 204
            stopped = events(client, answer)[-1][1]["message"]
    assert stopped["state"] == "stopped"
    assert client.post(f"/api/ui/messages/{answer}/resume", json={}).status_code == 202
    finished = events(client, answer)[-1][1]["message"]
    assert finished["text"].startswith(stopped["text"])
    assert finished["state"] == "done"
    assert client.post(f"/api/ui/messages/{answer}/stop", json={}).status_code == 204
    assert client.post(f"/api/ui/messages/{answer}/resume", json={}).status_code == 409


def test_search_rename_export_import_delete(client: httpx2.Client) -> None:
    conversation = new(client, system="Speak of 100% pears.")
    ask(client, conversation, "Do you like _pears_ of 7%?")
    found = client.get("/api/ui/conversations", params={"query": "_PEARS_ of 7%"}).json()["conversations"]
    assert [each["id"] for each in found] == [conversation]
    assert "pears" in found[0]["found"]
    assert client.get("/api/ui/conversations", params={"query": "p_ars"}).json()["conversations"] == []
    assert client.patch(f"/api/ui/conversations/{conversation}", json={"title": "Fruit"}).json()["title"] == "Fruit"
    exported = client.get(f"/api/ui/conversations/{conversation}/export")
    assert exported.headers["content-disposition"] == 'attachment; filename="Fruit.json"'
    copy = client.post("/api/ui/conversations/import", json=exported.json()).json()
    assert copy["id"] != conversation
    assert copy["system"] == "Speak of 100% pears."
    assert [message["text"] for message in copy["messages"]] == [message["text"] for message in exported.json()["messages"]]
    assert copy["leaf"] == copy["messages"][-1]["id"]
    ask(client, copy["id"], "And apples?")
    assert client.delete(f"/api/ui/conversations/{conversation}").status_code == 204
    assert client.get(f"/api/ui/conversations/{conversation}").status_code == 404


def test_the_list_comes_in_pages(client: httpx2.Client) -> None:
    made = [new(client, title=f"page {number}") for number in range(5)]
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = client.get("/api/ui/conversations", params={"query": "page ", "limit": 2, "before": cursor or None}).json()
        seen += [each["id"] for each in page["conversations"]]
        cursor = page["next"]
    assert seen == made[::-1]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("conversations", {"settings": {"temperature": 9}}, 422),
        ("conversations", {"settings": {"other": 1}}, 422),
        ("conversations", {"model": "other"}, 404),
        ("conversations", {"template": "other"}, 422),
        ("conversations", {"colour": "red"}, 422),
        ("conversations/import", {"messages": [{"id": "a", "role": "user", "text": "x", "parent": "b"}]}, 400),
        ("conversations/other/messages", {"text": "hello"}, 404),
        ("messages/other/regenerate", {}, 404),
        ("complete", {"text": ""}, 422),
        ("complete", {"text": "x", "tokens": [100000]}, 422),
    ],
)
def test_what_cannot_be_is_refused(client: httpx2.Client, path: str, body: dict[str, Any], status: int) -> None:
    answer = client.post(f"/api/ui/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_the_playground_goes_on_from_another_token(client: httpx2.Client) -> None:
    def complete(**body: Any) -> list[dict[str, Any]]:
        body["settings"] = {"max_tokens_to_generate": 4, "top_logprobs": 3}
        with client.stream("POST", "/api/ui/complete", json=body) as stream:
            lines = list(stream.iter_lines())
        kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event")]
        assert kinds == ["start", "token", "token", "token", "token", "done"]
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data")][1:-1]

    first = complete(text="The capital of")
    assert all(len(token["top"]) == 3 for token in first)
    on = complete(text="The capital of", tokens=[token["id"] for token in first[:2]])
    assert [token["id"] for token in on[:2]] == [token["id"] for token in first[2:]]
    complete(text="The capital of", tokens=[first[0]["id"], first[1]["top"][1]["id"]])


def test_an_answer_that_a_restart_interrupted_is_shown_so_and_goes_on(swarm: TinySwarm, tmp_path: Path) -> None:
    with running(swarm, tmp_path / "g.sqlite") as gateway, gateway.client() as client:
        conversation = new(client, settings={"max_tokens_to_generate": 400, "do_sample": False})
        answer = client.post(f"/api/ui/conversations/{conversation}/messages", json={"text": "hello there"}).json()["answer"]["id"]
        with client.stream("GET", f"/api/ui/messages/{answer}/events") as stream:
            next(line for line in stream.iter_lines() if line == "event: delta")
        # As a power cut would leave it, too:
        gateway.gateway.database.now(lambda connection: connection.exec_driver_sql("update messages set state='writing'"))
    with running(swarm, tmp_path / "g.sqlite") as gateway, gateway.client() as client:
        [_, message] = client.get(f"/api/ui/conversations/{conversation}").json()["messages"]
        assert message["state"] == "interrupted"
        client.patch(f"/api/ui/conversations/{conversation}", json={"settings": SHORT})
        assert client.post(f"/api/ui/messages/{answer}/resume", json={}).status_code == 202
        assert events(client, answer)[-1][1]["message"]["text"].startswith(message["text"])


def test_who_looks_on_is_told_that_the_gateway_ends(swarm: TinySwarm, tmp_path: Path) -> None:
    with running(swarm, tmp_path / "g.sqlite") as gateway, gateway.client() as client:
        conversation = new(client, settings={"max_tokens_to_generate": 400, "do_sample": False})
        with gateway.swarm.held("first"):
            answer = client.post(f"/api/ui/conversations/{conversation}/messages", json={"text": "hello there"}).json()["answer"]["id"]
            with client.stream("GET", f"/api/ui/messages/{answer}/events") as stream:
                lines = stream.iter_lines()
                next(lines)
                gateway.server.should_exit = True
                [done] = [line for line in lines if line.startswith('data: {"message"')]
    assert json.loads(done.removeprefix("data: "))["message"]["state"] == "interrupted"
