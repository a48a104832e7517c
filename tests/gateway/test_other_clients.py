"""What programs send that speak OpenAI's interface: lm-eval's local-completions and Open WebUI, as they send it."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from tests.gateway.running import Running

QUESTION = "What is the capital of France?"
BEGINNING, ENDINGS = "The capital of France", [" is", " of Italy"]


@pytest.fixture
def tokenizer(gateway: Running) -> Any:
    return gateway.gateway.models.named("tiny").tokenizer


@pytest.mark.parametrize(
    "path",
    ["tokenizer_info", "tokenize", "api/tags", "api/version", "v1/other", "version", "c", "c/a/b", "%00", "x" * 5000, "..%2f..%2fapp.py"],
)
def test_routes_of_other_servers_are_not_there(client: httpx2.Client, path: str) -> None:
    """lm-eval asks for vLLM's tokenizer, Open WebUI for Ollama's tags: what is no such thing must not look like one."""
    assert client.get(f"/{path}").status_code == 404


@pytest.mark.parametrize("path", ["", "playground", "swarm", "tuning", "c/abc"])
def test_the_page_s_own_paths_are(client: httpx2.Client, path: str) -> None:
    answer = client.get(f"/{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_lm_eval_scores_continuations(client: httpx2.Client, tokenizer: Any) -> None:
    """`local-completions`: token ids, several at once, and of each the scores after the context, but for the one new token."""
    prompts = [tokenizer.encode(BEGINNING + ending) for ending in ENDINGS]
    lengths = [len(tokenizer.encode(BEGINNING))] * len(prompts)
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = sorted(client.post("/v1/completions", json=body).json()["choices"], key=lambda choice: choice["index"])
    for choice, prompt, length in zip(choices, prompts, lengths, strict=True):
        scores, tops = choice["logprobs"]["token_logprobs"][length:-1], choice["logprobs"]["top_logprobs"][length:-1]
        assert len(scores) == len(tops) == len(prompt) - length
        assert all(score <= max(top.values()) for score, top in zip(scores, tops, strict=True))


def test_lm_eval_takes_a_continuation_for_greedy_when_it_is(client: httpx2.Client, tokenizer: Any) -> None:
    """It compares the token's score and the best one as they are, without a tolerance."""
    prompt = tokenizer.encode(BEGINNING)
    greedy = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 0}).json()["choices"][0]
    whole = [*prompt, *(tokenizer.encode(greedy["text"]))]
    body = {"prompt": [whole], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    scored = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert scored["tokens"][len(prompt) : -1] == greedy["logprobs"]["tokens"]  # or the text is made of other tokens
    pairs = zip(scored["token_logprobs"][len(prompt) : -1], scored["top_logprobs"][len(prompt) : -1], strict=True)
    assert all(score == max(top.values()) for score, top in pairs)


def test_lm_eval_generates(client: httpx2.Client, tokenizer: Any) -> None:
    body = {
        "prompt": [tokenizer.encode(QUESTION)],
        "model": "tiny",
        "max_tokens": 8,
        "temperature": 0,
        "stop": ["\n", ".", "<|endoftext|>"],
        "seed": 1234,
    }
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["index"] == 0
    assert not set("\n.") & set(choice["text"])
    chat = {**body, "messages": [{"role": "user", "content": QUESTION, "type": "text"}]}
    del chat["prompt"]
    assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] is not None


def test_open_webui_chats(client: httpx2.Client) -> None:
    """It lists the models, streams with whatever its users have set, and asks for a title with the same route."""
    headers = {"Authorization": "Bearer none"}  # what people enter where no key is needed
    [model] = client.get("/v1/models", headers=headers).json()["data"]
    body = {
        "model": model["id"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        "temperature": 1.3,
        "top_p": 0.9,
        "max_tokens": 6,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "stop": [],
        "tools": [],
        "user": {"name": "anna", "id": "1"},
        "metadata": {"chat_id": "1"},
    }
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    title = {**body, "stream": False, "max_completion_tokens": 5}
    del title["max_tokens"], title["stream_options"]
    assert client.post("/v1/chat/completions", json=title, headers=headers).json()["choices"][0]["finish_reason"]
