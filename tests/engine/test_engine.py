"""The engine's loop on a tiny model, driven turn by turn: `run_once` is public, so no test waits for a thread."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.parts import EngineParts
from corolla.engine.speculation import Guess, guess
from corolla.errors import Busy, CorollaError, EmptyPrompt, InvalidSetting, PromptTooLong, ServerFault
from corolla.messages import Cached, Cancel, Close, Gap, Reply, Token
from corolla.models.reference import Reference
from corolla.models.span import SpanModel, load_span
from corolla.types import Failed, FinishReason, GenerationSettings, Hidden, Span, Step
from tests.models import tiny

GREEDY = GenerationSettings(max_tokens_to_generate=40)
SAMPLED = GenerationSettings(max_tokens_to_generate=40, do_sample=True, temperature=0.9, top_p=0.8, seed=7)


class Driver:
    """An engine and the replies of every session."""

    def __init__(self, model: SpanModel, guess: Guess = guess, parts: EngineParts | None = None, **config: Any) -> None:
        config = {"cache_tokens": 4096, "page_size": 16, "step_rows": 64, **config}
        self.engine = Engine(model, EngineConfig(**config), parts or EngineParts(guess=guess))
        self.replies: dict[str, list[Reply]] = defaultdict(list)

    def send(
        self,
        session: str,
        tokens: Sequence[int] | torch.Tensor,
        start: int = 0,
        settings: GenerationSettings | None = GREEDY,
        client: str = "",
    ) -> None:
        self.engine.receive(Step(session, start, tokens, settings=settings, client=client), self.replies[session].append)

    def run(self, turns: int = 10_000) -> None:
        for _ in range(turns):
            busy = self.engine.run_once()
            self.engine.check_integrity()
            if not busy:
                return

    def tokens(self, session: str) -> list[int]:
        return [reply.token_id for reply in self.replies[session] if isinstance(reply, Token)]


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, tiny.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: SpanModel, tokens: Sequence[int], settings: GenerationSettings = GREEDY) -> list[int]:
    driver = Driver(model)
    driver.send("a", tokens, settings=settings)
    driver.run()
    return driver.tokens("a")


def test_answer_equals_stock(model: SpanModel, directory: Path) -> None:
    assert alone(model, prompt(0, 50)) == Reference(directory).greedy(prompt(0, 50), 40)


@pytest.mark.parametrize(
    "settings", [GREEDY, GenerationSettings(max_tokens_to_generate=40, do_sample=True, temperature=0.9, top_p=0.8, seed=7)]
)
def test_packed_with_31_others_equals_alone(model: SpanModel, settings: GenerationSettings) -> None:
    prompts = {str(i): prompt(i, 1 + 5 * i) for i in range(32)}
    driver = Driver(model, cache_tokens=16384)
    for session, tokens in prompts.items():
        driver.send(session, tokens, settings=settings)
    driver.run()
    assert {s: driver.tokens(s) for s in prompts} == {s: alone(model, tokens, settings) for s, tokens in prompts.items()}


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_prefill_in_chunks_equals_one_piece(model: SpanModel, rows: int) -> None:
    driver = Driver(model, step_rows=rows)
    driver.send("a", prompt(1, 150))
    driver.run()
    whole = Driver(model, step_rows=512)
    whole.send("a", prompt(1, 150))
    whole.run()
    assert driver.tokens("a") == whole.tokens("a")


def test_tokens_name_their_positions_and_the_last_one_its_reason(model: SpanModel) -> None:
    driver = Driver(model)
    driver.send("a", prompt(0, 10), settings=GenerationSettings(max_tokens_to_generate=3))
    driver.run()
    assert [(r.position, r.finish) for r in driver.replies["a"]] == [(10, None), (11, None), (12, FinishReason.LENGTH)]


def test_a_stop_token_ends_the_answer(model: SpanModel) -> None:
    expected = alone(model, prompt(2, 20))
    stop = expected[5]
    driver = Driver(model)
    driver.send("a", prompt(2, 20), settings=GenerationSettings(stop_token_ids=(stop,)))
    driver.run()
    assert driver.tokens("a") == expected[: expected.index(stop) + 1]
    assert driver.replies["a"][-1].finish is FinishReason.STOP


def test_the_context_ends_the_answer(directory: Path) -> None:
    driver = Driver(load_span(directory, dtype="float32"), cache_tokens=64)
    driver.send("a", prompt(0, 60))
    driver.run()
    assert len(driver.tokens("a")) == 4
    assert driver.replies["a"][-1].finish is FinishReason.LENGTH


def test_a_second_turn_computes_only_what_is_new(model: SpanModel) -> None:
    driver = Driver(model)
    history = prompt(3, 400)
    driver.send("a", history)
    driver.run()
    history += driver.tokens("a")
    before = driver.engine.counters.rows
    driver.replies.clear()
    driver.send("a", [history[-1], *prompt(4, 10)], start=len(history) - 1)
    driver.run(1)
    assert driver.engine.counters.rows - before == 11
    driver.run()
    assert driver.tokens("a") == alone(model, history + prompt(4, 10))


def test_a_shared_beginning_is_computed_once(model: SpanModel) -> None:
    driver = Driver(model)
    for session in "ab":
        driver.send(session, prompt(5, 100) + prompt(ord(session), 8))
        driver.run()
    assert driver.engine.counters.reused == 96
    assert driver.tokens("b") == alone(model, prompt(5, 100) + prompt(ord("b"), 8))


def test_an_edit_goes_back_to_its_position(model: SpanModel) -> None:
    driver = Driver(model)
    driver.send("a", prompt(6, 90))
    driver.run()
    driver.replies.clear()
    driver.send("a", prompt(7, 12), start=33)
    driver.run()
    assert driver.tokens("a") == alone(model, prompt(6, 90)[:33] + prompt(7, 12))


def test_an_edit_of_a_shared_page_leaves_the_other_session_alone(model: SpanModel) -> None:
    driver = Driver(model)
    for session in "ab":
        driver.send(session, prompt(6, 90), settings=None)
        driver.run()
    driver.send("b", prompt(7, 12), start=33)
    driver.run()
    assert driver.tokens("b") == alone(model, prompt(6, 90)[:33] + prompt(7, 12))
    driver.replies.clear()
    driver.send("a", prompt(6, 90)[-1:], start=89)
    driver.run()
    assert driver.tokens("a") == alone(model, prompt(6, 90))


def test_a_step_past_what_is_cached_is_a_gap(model: SpanModel) -> None:
    driver = Driver(model)
    driver.send("a", prompt(0, 5), start=10)
    driver.run()
    assert driver.replies["a"] == [Gap("a", 0, 0)]
    driver.send("a", prompt(0, 10), settings=None)
    driver.run()
    driver.send("a", prompt(0, 5), start=12)
    driver.run()
    assert driver.replies["a"][1:] == [Cached("a", 0, 10), Gap("a", 0, 10)]


def test_an_idle_session_is_evicted_and_comes_back(model: SpanModel) -> None:
    driver = Driver(model, cache_tokens=256)
    for i in range(4):
        driver.send(str(i), prompt(i, 100), settings=None)
        driver.run()
    assert driver.engine.counters.evicted_idle >= 2
    driver.send("0", [7], start=100)
    driver.run()
    assert driver.replies["0"][-1] == Gap("0", 0, 0)
    driver.send("0", [*prompt(0, 100), 7])
    driver.run()
    assert driver.tokens("0") == alone(model, [*prompt(0, 100), 7])


def test_64_sessions_where_few_fit_all_finish(model: SpanModel) -> None:
    driver = Driver(model, cache_tokens=512)
    for i in range(64):
        driver.send(str(i), prompt(i, 20 + i % 30))
    driver.run()
    assert driver.engine.counters.evicted_running > 0
    assert all(driver.tokens(str(i)) == alone(model, prompt(i, 20 + i % 30)) for i in range(64))


def test_cancel_frees_what_the_answer_had_reserved(model: SpanModel) -> None:
    driver = Driver(model)
    driver.send("a", prompt(0, 100))
    driver.run(3)
    had = len(driver.tokens("a"))
    driver.engine.receive(Cancel("a", 0))
    driver.run()
    assert len(driver.tokens("a")) == had
    driver.engine.receive(Close("a"))
    driver.run()
    assert driver.engine.pool.free_pages == driver.engine.pool.num_pages


def test_cancel_of_an_older_generation_changes_nothing(model: SpanModel) -> None:
    driver = Driver(model)
    driver.send("a", prompt(0, 10))
    driver.run(2)
    driver.engine.receive(Cancel("a", generation=3))
    driver.run()
    assert len(driver.tokens("a")) == 40


def test_one_more_than_max_active_is_busy(model: SpanModel) -> None:
    driver = Driver(model, max_active=2, retry_after=0.5)
    driver.send("a", prompt(0, 10))
    driver.send("b", prompt(0, 10))
    with pytest.raises(Busy) as busy:
        driver.send("c", prompt(0, 10))
    assert busy.value.retry_after == 0.5
    driver.run()
    driver.send("c", prompt(0, 10))


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Step("a", 0, []), EmptyPrompt),
        (Step("a", 0, [1] * 513), PromptTooLong),
        (Step("a", 0, [1] * 512, settings=GREEDY), PromptTooLong),
        (Step("a", -1, [1]), InvalidSetting),
        (Step("a", 0, [tiny.VOCABULARY]), InvalidSetting),
        (Step("a", 0, [1], settings=GenerationSettings(top_k=tiny.VOCABULARY + 1)), InvalidSetting),
    ],
)
def test_bad_steps_are_refused_at_once(model: SpanModel, step: Step, error: type[CorollaError]) -> None:
    driver = Driver(model)
    with pytest.raises(error):
        driver.engine.receive(step, driver.replies["a"].append)
    driver.run()
    assert driver.engine.pool.free_pages == driver.engine.pool.num_pages


PENALIZED = GenerationSettings(repetition_penalty=1.5)
SCORED = GenerationSettings(prompt_logprobs=True)


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        ((-(10**9), 1), {"settings": PENALIZED}),
        ((1, 10**9), {"settings": SCORED}),
        ((1, tiny.VOCABULARY), {}),
        ((1, -1), {"wants_hidden": True}),
        ((1,), {}),
        ((1, 2, 3), {}),
        ((), {"settings": PENALIZED}),
        ((), {"settings": SCORED}),
        ((), {"drafts": 1, "settings": GREEDY}),
        ((1, 2), {"drafts": 2}),
        ((1, 2), {"start": 4095}),
        ((1, 2), {"began": -1}),
    ],
)
def test_bad_ids_beside_hidden_states_are_refused_at_once(directory: Path, tokens: tuple[int, ...], changes: dict[str, Any]) -> None:
    driver = Driver(load_span(directory, Span(2, 4), dtype="float32"))
    step = Step(**{"session": "a", "start": 0, "payload": torch.zeros(2, 64), "tokens": tokens, **changes})
    with pytest.raises((InvalidSetting, PromptTooLong)):
        driver.engine.receive(step, driver.replies["a"].append)


@pytest.mark.parametrize("more", [True, False])
def test_rows_with_ids_behind_rows_without_are_a_gap(directory: Path, more: bool) -> None:
    driver = Driver(load_span(directory, Span(2, 4), dtype="float32"))
    take = driver.replies["a"].append
    driver.engine.receive(Step("a", 0, torch.zeros(40, 64), more=more, wants_hidden=True), take)
    if not more:
        driver.run()
    driver.engine.receive(Step("a", 40, torch.zeros(2, 64), generation=0 if more else 1, settings=GREEDY, tokens=(1, 2), drafts=1), take)
    driver.run()
    assert isinstance(driver.replies["a"][-1], Gap)


def test_spans_pass_hidden_states(directory: Path, model: SpanModel) -> None:
    first = Driver(load_span(directory, Span(0, 2), dtype="float32"))
    second = Driver(load_span(directory, Span(2, 4), dtype="float32"))
    tokens = prompt(0, 100)
    first.send("a", tokens, settings=None)
    first.run()
    for reply in first.replies["a"]:
        assert isinstance(reply, Hidden)
        settings = GenerationSettings(max_tokens_to_generate=1) if reply.start + len(reply.hidden) == len(tokens) else None
        second.send("a", reply.hidden, start=reply.start, settings=settings)
        second.run()
    assert second.tokens("a") == alone(model, tokens)[:1]
    with pytest.raises(InvalidSetting):
        second.send("b", torch.zeros(3, 5))


def test_a_broken_forward_fails_its_sessions_and_no_others(directory: Path) -> None:
    driver = Driver(load_span(directory, Span(2, 4), dtype="float32"))
    driver.send("bad", torch.full((4, 64), float("nan")), settings=GREEDY)
    driver.run()
    reply = driver.replies["bad"][0]
    assert isinstance(reply, Failed)
    assert isinstance(reply.error, ServerFault)
    driver.send("good", torch.zeros(4, 64), settings=None)
    driver.run()
    assert driver.replies["good"] == [Cached("good", 0, 4)]


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_batch_invariant_bfloat16_is_the_same_to_the_bit(directory: Path, weights: Any) -> None:
    model = load_span(directory, dtype="bfloat16", weights=weights)
    settings = GenerationSettings(max_tokens_to_generate=30, top_logprobs=5)

    def replies(others: int, pieces: int) -> list[tuple[int, float, Any]]:
        driver = Driver(model, batch_invariant=True)
        for i in range(others):
            driver.send(str(i), prompt(i + 50, 10 + 9 * i))
        tokens = prompt(0, 60)
        for start in range(0, 60 - pieces, pieces):
            driver.send("a", tokens[start : start + pieces], start=start, settings=None)
            while not driver.replies["a"] or driver.replies["a"][-1].position != start + pieces:
                driver.run(1)
        driver.send("a", tokens[start + pieces :], start=start + pieces, settings=settings)
        driver.run()
        return [(r.token_id, r.logprob, r.top_logprobs) for r in driver.replies["a"] if isinstance(r, Token)]

    expected = replies(0, 59)
    assert len(expected) == 30
    assert replies(5, 59) == expected
    assert replies(0, 7) == expected
    assert replies(9, 1) == expected


def test_the_thread_serves_and_stops(model: SpanModel) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=1024))
    replies: list[Reply] = []
    engine.start()
    engine.receive(Step("a", 0, prompt(0, 10), settings=GenerationSettings(max_tokens_to_generate=10_000)), replies.append)
    while len(replies) < 3:
        time.sleep(0)
    engine.stop()
    assert isinstance(replies[-1], Failed)
