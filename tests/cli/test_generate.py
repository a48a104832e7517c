from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import toy

Run = Callable[..., Any]


def test_the_continuation_alone_goes_to_standard_output(corolla: Run, model: Any) -> None:
    result = corolla("generate", "toy", "--prompt", "hello", "--dtype", "float32", "--threads", "1")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "fine, thank you!\n", "")
    assert model.opened[0][1].items() >= {"dtype": "float32", "threads": 1, "weights": None}.items()
    settings = model.engine.steps[0].settings
    assert not settings.do_sample
    assert settings.stop_token_ids == (toy.END,)


def test_json_is_one_object(corolla: Run, model: Any) -> None:
    result = corolla("generate", "toy", "--prompt", "hello", "--json", "--max-new-tokens", "3")
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == "length"
    assert answer["text"] == model.tokenizer.decode(answer["token_ids"])
    assert answer["logprobs"] == [-1.0, -2.0, -3.0]
    assert answer["timings"].keys() == {"total_s", "first_token_s", "tokens_per_s"}
    assert answer["prompt_tokens"] == len(model.tokenizer.encode("hello"))
    assert "top_logprobs" not in answer


def test_the_prompt_may_come_from_standard_input(corolla: Run, model: Any) -> None:
    assert corolla("generate", "toy", "--prompt", "-", stdin="hello there").exit_code == 0
    assert list(model.engine.steps[0].payload) == model.tokenizer.encode("hello there")


def test_sampling_options(corolla: Run, model: Any) -> None:
    options = "--temperature 0.5 --top-p 0.8 --top-k 3 --repetition-penalty 1.2 --seed 4 --stop thank --stop !"
    assert corolla("generate", "toy", "--prompt", "hello", *options.split()).stdout == "fine, \n"
    settings = model.engine.steps[0].settings
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 0.5, 0.8, 3)
    assert (settings.repetition_penalty, settings.seed, settings.stop_sequences) == (1.2, 4, ("thank", "!"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--temperature", "2.5"], "temperature: 2.5"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_tokens_to_generate: 0"),
        (["--prompt", "a", "--top-logprobs", "21"], "top_logprobs: 21"),
        (["--prompt", "\udcff"], "not valid Unicode"),
        (["--prompt", "-"], "not valid Unicode"),
        (["--prompt", "a", "--timings", "--json"], "timings: they are a swarm's"),
    ],
)
def test_bad_input_is_one_line(corolla: Run, arguments: list[str], message: str) -> None:
    result = corolla("generate", "toy", *arguments, stdin=b"\xff")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
