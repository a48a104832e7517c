"""OpenAI's interface, through OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import openai
import pytest

from tests.gateway.running import Running

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def ai(gateway: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["tiny"]
    assert ai.models.retrieve("tiny").owned_by == "corolla"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        ai.models.retrieve("other")


def test_a_chat_whole_and_streamed_is_the_same(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=12)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    stream = ai.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_a_seed_draws_the_same_answer_and_n_draws_several(ai: openai.OpenAI) -> None:
    def ask(**options: object) -> list[str | None]:
        answer = ai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8, **options)  # type: ignore[call-overload]
        return [choice.message.content for choice in answer.choices]

    three = ask(seed=3, n=3)
    assert three == ask(seed=3, n=3)
    assert len(set(three)) > 1
    assert ask(seed=4) == [three[1]]
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in ai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8, seed=3, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == three


def test_log_probabilities_of_a_chat(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for entry in logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob == max(top.logprob for top in entry.top_logprobs)
        assert bytes(entry.bytes or []) == entry.token.encode()


def test_stop_cuts_the_answer(ai: openai.OpenAI) -> None:
    whole = ai.completions.create(model="tiny", prompt="The capital of", temperature=0, max_tokens=30).choices[0].text
    stop = whole[5:8]
    cut = ai.completions.create(model="tiny", prompt="The capital of", temperature=0, max_tokens=30, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_completions_of_texts_and_of_token_ids(ai: openai.OpenAI, gateway: Running) -> None:
    model = gateway.gateway.models.named("tiny")
    prompts = ["The capital of France", "hello there"]
    texts = ai.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=5)
    ids = ai.completions.create(model="tiny", prompt=[model.tokenizer.encode(text) for text in prompts], temperature=0, max_tokens=5)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ids.choices]
    assert [choice.index for choice in texts.choices] == [0, 1]


def test_an_echoed_prompt_has_scores_as_lm_eval_reads_them(ai: openai.OpenAI, gateway: Running) -> None:
    tokens = gateway.gateway.models.named("tiny").tokenizer.encode("What is the capital of France?")
    answer = ai.completions.create(model="tiny", prompt=[tokens], temperature=0, max_tokens=1, logprobs=1, echo=True).choices[0]
    assert answer.logprobs is not None
    scores, tops = answer.logprobs.token_logprobs, answer.logprobs.top_logprobs
    assert scores is not None
    assert tops is not None
    assert len(scores) == len(tops) == len(tokens) + 1
    assert scores[0] is None
    assert all(score <= max(top.values()) + 1e-6 for score, top in zip(scores[1:], tops[1:], strict=True))
    assert answer.text.startswith("What is the capital of France?")
    nothing = ai.completions.create(model="tiny", prompt=[tokens], temperature=0, max_tokens=0, logprobs=1, echo=True).choices[0]
    assert nothing.logprobs is not None
    assert nothing.logprobs.token_logprobs == pytest.approx(scores[:-1])


@pytest.mark.parametrize(
    ("options", "status", "word"),
    [
        ({"temperature": 3.0}, 422, "temperature"),
        ({"presence_penalty": 1.0}, 422, "presence_penalty"),
        ({"n": 1000}, 422, "n"),
        ({"top_logprobs": 5}, 422, "logprobs"),
        ({"extra_body": {"template": "none"}}, 422, "template"),
        ({"messages": [{"role": "user", "content": "hello " * 600}]}, 413, "context"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 413, "context"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, 422, "role"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(ai: openai.OpenAI, options: dict, status: int, word: str) -> None:
    with pytest.raises(openai.APIStatusError, match=word) as raised:
        ai.chat.completions.create(**{"model": "tiny", "messages": CHAT, **options})
    assert raised.value.status_code == status


@pytest.mark.parametrize("temperature", [1e-39, 5e-324, 1e-30, -1.0, 1e308])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "top_p": 0.9}),
        ("/v1/completions", {"prompt": "hi", "top_p": 0.9}),
        ("/api/v1/generate", {"inputs": "hi", "max_new_tokens": 4, "do_sample": 1, "top_p": 0.9}),
        ("/api/ui/complete", {"text": "hi"}),
        ("/api/ui/conversations", {"text": "hi"}),
    ],
)
def test_a_temperature_that_no_sampler_holds_is_refused_and_the_next_request_answered(
    client: httpx2.Client, gateway: Running, path: str, body: dict, temperature: float
) -> None:
    asked = {"settings": {"do_sample": True, "temperature": temperature}} if path.startswith("/api/ui") else {"temperature": temperature}
    assert client.post(path, json={**body, **asked}).status_code == 422
    assert client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}).status_code == 200
    assert all(engine.healthy for engine in gateway.swarm.engines.values())
