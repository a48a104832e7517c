"""Soft prompts over HTTP: chosen in a conversation, in the playground and by OpenAI's interface; and what `tuning` shows of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from corolla.gateway.service import GatewayConfig
from tests.gateway.running import CONTEXT, Running, TinySwarm, make_model, running
from tests.gateway.soft import make_prompt, make_record
from tests.gateway.test_conversations import ask, new

TOKENS = 5
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def prompts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "near" and "deep", "foreign" of another model, "damaged", and "begun", which has a record and no prompt yet."""
    folder = tmp_path_factory.mktemp("prompts")
    wide = make_model(tmp_path_factory.mktemp("wide"), hidden_size=128)
    make_prompt(folder / "near", tiny_model, TOKENS)
    make_prompt(folder / "deep", tiny_model, TOKENS, deep=True)
    make_prompt(folder / "foreign", wide, TOKENS)
    make_prompt(folder / "damaged", tiny_model, TOKENS)
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(b"nothing")
    make_record(folder / "near")
    make_record(folder / "begun", status="running")
    return folder


@pytest.fixture(scope="module")
def tuned(swarm: TinySwarm, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(swarm, tmp_path_factory.mktemp("tuned") / "g.sqlite", GatewayConfig(prompts=prompts, drain=0.5)) as gateway:
        yield gateway


@pytest.fixture
def at_tuned(tuned: Running) -> Iterator[httpx2.Client]:
    with tuned.client() as client:
        yield client


def test_what_is_at_hand(at_tuned: httpx2.Client) -> None:
    state = {each["id"]: each for each in at_tuned.get("/api/ui/state").json()["prompts"]}
    assert {name: (each["model"], each["tokens"], each["deep"]) for name, each in state.items()} == {
        "near": ("tiny", TOKENS, False),
        "deep": ("tiny", TOKENS, True),
    }
    runs = {each["id"]: each for each in at_tuned.get("/api/ui/tuning").json()["runs"]}
    assert runs["near"]["tuning"]["status"] == "done"
    assert (runs["begun"]["tuning"]["status"], runs["begun"]["prompt_id"]) == ("running", None)
    assert runs["foreign"]["problem"]
    assert runs["damaged"]["problem"]


def test_a_conversation_begins_with_the_prompt_that_is_chosen(at_tuned: httpx2.Client) -> None:
    texts = [ask(at_tuned, new(at_tuned, prompt=name), QUESTION)["text"] for name in (None, "near", "deep", "near")]
    assert texts[1] == texts[3]
    assert len(set(texts)) == 3
    conversation = new(at_tuned, prompt="near")
    ask(at_tuned, conversation, QUESTION)
    at_tuned.patch(f"/api/ui/conversations/{conversation}", json={"prompt": None})
    assert ask(at_tuned, conversation, QUESTION, parent=None)["text"] == texts[0]


def complete(client: httpx2.Client, name: str | None) -> str:
    body = {"text": QUESTION, "prompt": name, "settings": {"max_tokens_to_generate": 8}}
    with client.stream("POST", "/api/ui/complete", json=body) as stream:
        given = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data")]
    return "".join(each.get("text", "") for each in given)


def test_every_interface_gives_the_same_answer_with_it(tuned: Running, at_tuned: httpx2.Client) -> None:
    with openai.OpenAI(base_url=f"{tuned.url}/v1", api_key="none", max_retries=0) as ai:
        for name in (None, "near", "deep"):
            options: dict[str, Any] = {"model": "tiny", "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
            whole = ai.completions.create(**options, extra_body={"soft_prompt": name}).choices[0].text
            pieces = ai.completions.create(**options, extra_body={"soft_prompt": name}, stream=True)
            assert "".join(each.choices[0].text for each in pieces) == whole == complete(at_tuned, name)
        chat = [{"role": "user", "content": QUESTION}]
        said = [
            ai.chat.completions.create(model="tiny", messages=chat, temperature=0, max_tokens=6, extra_body={"soft_prompt": name})
            .choices[0]
            .message.content
            for name in (None, "near")
        ]
    assert said[1] == ask(at_tuned, new(at_tuned, prompt="near"), QUESTION)["text"] != said[0]


def test_an_echoed_text_is_scored_as_after_it(at_tuned: httpx2.Client) -> None:
    body = {"model": "tiny", "prompt": QUESTION, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    plain, soft = (at_tuned.post("/v1/completions", json=body | more).json()["choices"][0] for more in ({}, {"soft_prompt": "near"}))
    assert plain["text"] == soft["text"] == QUESTION
    before, after = plain["logprobs"]["token_logprobs"], soft["logprobs"]["token_logprobs"]
    assert len(before) == len(after)
    assert before[0] is None
    assert all(score < 0 for score in after)
    assert before[1:] != after[1:]


@pytest.mark.parametrize("name", ["none such", "foreign", "damaged", "begun", "../near"])
def test_what_is_no_prompt_of_the_model_is_refused(at_tuned: httpx2.Client, name: str) -> None:
    body = {"prompt": QUESTION, "max_tokens": 3, "soft_prompt": name}
    answer = at_tuned.post("/v1/completions", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["message"]
    assert at_tuned.post("/api/ui/complete", json={"text": "x", "prompt": name}).status_code == 422


def test_it_takes_room_in_the_context(at_tuned: httpx2.Client) -> None:
    tokens = [5] * (CONTEXT - TOKENS)
    assert at_tuned.post("/v1/completions", json={"prompt": tokens, "max_tokens": 1}).status_code == 200
    assert at_tuned.post("/v1/completions", json={"prompt": tokens, "max_tokens": 1, "soft_prompt": "near"}).status_code == 413
