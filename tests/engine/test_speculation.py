"""Guesses of the tokens that follow: whatever is guessed, an answer is the one that is written without guesses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.parts import EngineParts
from corolla.engine.speculation import Guess, guess
from corolla.errors import InvalidSetting
from corolla.messages import Cancel, Gap, Reply, Token
from corolla.models.span import SpanModel, load_span
from corolla.types import FinishReason, GenerationSettings, Hidden, Span, Step
from tests.engine.test_engine import Driver, prompt
from tests.models import tiny

LENGTH = 40
SETTINGS = {
    "greedy": GenerationSettings(max_tokens_to_generate=LENGTH),
    "drawn": GenerationSettings(max_tokens_to_generate=LENGTH, do_sample=True, temperature=0.9, top_k=50, top_p=0.9, seed=11),
    "penalized": GenerationSettings(max_tokens_to_generate=LENGTH, repetition_penalty=1.8, top_logprobs=3),
}


def knowing(*texts: Sequence[int], right: int = 15) -> Guess:
    """Guesses what follows in the text that begins alike, the first `right` of them as they are there."""

    def oracle(history: Sequence[int], token: int, most: int) -> tuple[int, ...]:
        known = [*history, token]
        text = next(text for text in texts if list(text[: len(known)]) == known)
        following = text[len(known) : len(known) + most]
        return tuple(token if place < right else (token + 1) % tiny.VOCABULARY for place, token in enumerate(following))

    return oracle


def replies(model: SpanModel, tokens: Sequence[int], settings: GenerationSettings, guess: Guess = guess, **config: Any) -> list[Token]:
    """The answer's tokens, without what is said of guesses."""
    driver = Driver(model, guess, **config)
    driver.send("a", tokens, settings=settings)
    driver.run()
    tokens_of = [reply for reply in driver.replies["a"] if isinstance(reply, Token)]
    assert len(tokens_of) == len(driver.replies["a"])
    return [msgspec.structs.replace(token, more=False, drafts=()) for token in tokens_of]


@pytest.mark.parametrize(
    ("history", "token", "most", "expected"),
    [
        ([1, 2, 3, 4, 1], 2, 3, (3, 4, 1)),
        ([1, 2, 3, 4, 1], 2, 1, (3,)),
        ([1, 2, 3, 1, 2, 9, 1], 2, 3, (9, 1, 2)),  # the last time counts
        ([5, 5], 5, 3, (5,)),
        ([1, 2, 3], 4, 3, ()),
        ([1], 1, 3, ()),
        ([], 1, 3, ()),
        ([0, 256, 1, 0], 0, 3, ()),  # the bytes of which stand there, across tokens
        ([7, 8, *range(100, 4300), 7], 8, 3, ()),  # too long ago
    ],
)
def test_what_followed_before_is_guessed_to_follow(history: list[int], token: int, most: int, expected: tuple[int, ...]) -> None:
    assert guess(history, token, most) == expected


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("right", [0, 1, 2, 15])
@pytest.mark.parametrize("most", [1, 3, 7])
def test_an_answer_is_the_same_whatever_is_guessed(model: SpanModel, settings: GenerationSettings, right: int, most: int) -> None:
    asked = prompt(3, 20)
    plain = replies(model, asked, settings, drafts=0)
    text = [*asked, *(token.token_id for token in plain)]
    guessed = replies(model, asked, settings, knowing(text, right=right), drafts=most)
    assert [(t.position, t.token_id, t.finish) for t in guessed] == [(t.position, t.token_id, t.finish) for t in plain]
    if most <= 3:  # as few rows as compute what each of them computes alone
        assert guessed == plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "mistral-window"])
def test_a_guess_changes_no_bit_of_a_lone_session(family: str, dtype: str, tmp_path: Path) -> None:
    model = load_span(tiny.save(family, tmp_path), dtype=dtype)
    asked = prompt(5, 30)
    plain = replies(model, asked, SETTINGS["greedy"], drafts=0)
    text = [*asked, *(token.token_id for token in plain)]
    for right in (2, 15):
        assert replies(model, asked, SETTINGS["greedy"], knowing(text, right=right)) == plain


def test_batch_invariant_answers_are_the_same_to_the_bit_beside_others(directory: Path) -> None:
    model = load_span(directory, dtype="bfloat16")
    prompts = {str(i): prompt(i, 5 + 9 * i) for i in range(4)}
    plain = {s: replies(model, tokens, SETTINGS["drawn"], drafts=0, batch_invariant=True) for s, tokens in prompts.items()}
    texts = [[*tokens, *(token.token_id for token in plain[s])] for s, tokens in prompts.items()]
    driver = Driver(model, knowing(*texts, right=2), batch_invariant=True)
    for session, tokens in prompts.items():
        driver.send(session, tokens, settings=SETTINGS["drawn"])
        driver.run(turns=5)
    driver.run()
    assert driver.engine.counters.drafts_kept
    for session in prompts:
        answered = [(t.token_id, t.logprob) for t in driver.replies[session] if isinstance(t, Token)]
        assert answered == [(t.token_id, t.logprob) for t in plain[session]]


@pytest.mark.parametrize("sessions", [1, 2])
def test_one_session_takes_fewer_steps_and_several_do_not_take_one_anothers_time(model: SpanModel, sessions: int) -> None:
    prompts = {str(i): prompt(i, 10) for i in range(sessions)}
    plain = {s: [token.token_id for token in replies(model, tokens, SETTINGS["greedy"], drafts=0)] for s, tokens in prompts.items()}
    driver = Driver(model, knowing(*([*prompts[s], *plain[s]] for s in prompts)))
    for session, tokens in prompts.items():
        driver.send(session, tokens, settings=SETTINGS["greedy"])
    driver.run()
    assert {s: driver.tokens(s) for s in prompts} == plain
    assert (driver.engine.counters.steps < LENGTH // 2) == (sessions == 1)


def test_counters_tell_guesses_and_those_that_were_right(model: SpanModel) -> None:
    asked = prompt(3, 20)
    text = [*asked, *(token.token_id for token in replies(model, asked, SETTINGS["greedy"], drafts=0))]
    driver = Driver(model, knowing(text, right=1), drafts=3)
    driver.send("a", asked, settings=SETTINGS["greedy"])
    driver.run()
    counters = driver.engine.counters
    assert counters.sampled == LENGTH
    assert 0 < counters.drafts_kept < counters.drafted
    assert counters.steps == LENGTH - counters.drafts_kept


def test_a_stop_token_among_guesses_that_are_right_ends_the_answer(model: SpanModel) -> None:
    asked = prompt(2, 20)
    plain = [token.token_id for token in replies(model, asked, SETTINGS["greedy"], drafts=0)]
    for place in range(1, 9):
        stop = plain[place]
        settings = GenerationSettings(stop_token_ids=(stop,))
        answered = replies(model, asked, settings, knowing([*asked, *plain]))
        assert [token.token_id for token in answered] == plain[: plain.index(stop) + 1]
        assert [token.finish for token in answered if token.finish] == [FinishReason.STOP]


@pytest.mark.parametrize("length", range(1, 10))
def test_the_limit_of_tokens_holds_with_guesses(model: SpanModel, length: int) -> None:
    asked = prompt(2, 20)
    plain = [token.token_id for token in replies(model, asked, SETTINGS["greedy"], drafts=0)]
    answered = replies(model, asked, GenerationSettings(max_tokens_to_generate=length), knowing([*asked, *plain]))
    assert [token.token_id for token in answered] == plain[:length]
    assert answered[-1].finish is FinishReason.LENGTH


def test_the_context_ends_an_answer_with_guesses_where_it_ends_one_without(model: SpanModel) -> None:
    asked = prompt(2, 43)
    settings = GenerationSettings(max_tokens_to_generate=100)
    plain = replies(model, asked, settings, drafts=0, cache_tokens=64)
    assert len(plain) == 21
    text = [*asked, *(token.token_id for token in plain)]
    assert replies(model, asked, settings, knowing(text), cache_tokens=64) == plain


def test_a_guess_takes_no_page_of_another_session(model: SpanModel) -> None:
    asked, others = prompt(2, 30), prompt(4, 30)
    plain = replies(model, asked, SETTINGS["greedy"], drafts=0)
    text = [*asked, *(token.token_id for token in plain)]
    driver = Driver(model, knowing(text, right=1), cache_tokens=96, page_size=16)  # of which the answer takes 70
    driver.send("idle", others, settings=None)
    driver.run()
    short = replace(SETTINGS["greedy"], max_tokens_to_generate=34)  # that ends at the last position of a page
    driver.send("a", asked, settings=short)
    driver.run()
    assert driver.tokens("a") == [token.token_id for token in plain][:34]
    assert driver.engine.counters.evicted_idle == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_guesses_that_do_not_fit_a_step_are_dropped(model: SpanModel, rows: int) -> None:
    prompts = {"a": prompt(2, 9), "b": prompt(4, 9)}
    plain = {s: [token.token_id for token in replies(model, tokens, SETTINGS["greedy"], drafts=0)] for s, tokens in prompts.items()}
    driver = Driver(model, knowing(*([*prompts[s], *plain[s]] for s in prompts)), step_rows=rows)
    for session, tokens in prompts.items():
        driver.send(session, tokens, settings=SETTINGS["greedy"])
    driver.run()
    assert {s: driver.tokens(s) for s in prompts} == plain


def test_sessions_that_do_not_fit_together_are_set_back_and_finish_the_same(model: SpanModel) -> None:
    prompts = {str(i): prompt(i, 30) for i in range(4)}
    plain = {s: [token.token_id for token in replies(model, tokens, SETTINGS["greedy"], drafts=0)] for s, tokens in prompts.items()}
    driver = Driver(model, knowing(*([*prompts[s], *plain[s]] for s in prompts), right=2), cache_tokens=160, page_size=16)
    for session, tokens in prompts.items():
        driver.send(session, tokens, settings=SETTINGS["greedy"])
    driver.run()
    assert driver.engine.counters.evicted_running
    assert {s: driver.tokens(s) for s in prompts} == plain


def test_a_cancelled_answer_leaves_nothing_that_was_guessed(model: SpanModel) -> None:
    asked, more = prompt(2, 20), prompt(6, 5)
    plain = [token.token_id for token in replies(model, asked, SETTINGS["greedy"], drafts=0)]
    driver = Driver(model, knowing([*asked, *plain], right=2))
    driver.send("a", asked)
    driver.run(turns=4)
    driver.engine.receive(Cancel("a", 0))
    driver.run()
    had = driver.tokens("a")
    assert had == plain[: len(had)]
    whole = [*asked, *had, *more]
    second = replies(model, whole, SETTINGS["greedy"], drafts=0)
    start = len(asked) + len(had) - 1
    before = driver.engine.counters.rows
    driver.replies.clear()
    driver.engine.config = replace(driver.engine.config, drafts=0)
    driver.send("a", whole[start:], start=start, settings=SETTINGS["greedy"])
    driver.run()
    assert driver.tokens("a") == [token.token_id for token in second]
    assert driver.engine.counters.rows - before == len(whole) - start + LENGTH - 1


def test_guesses_are_told_only_of_rows_that_come(model: SpanModel) -> None:
    engine = Engine(model)
    for drafts in (-1, 2):
        with pytest.raises(InvalidSetting, match="drafts"):
            engine.receive(Step("a", 0, [5, 6], settings=SETTINGS["greedy"], drafts=drafts), print)


def test_guesses_go_through_spans_and_the_head_says_which_were_right(directory: Path, model: SpanModel) -> None:
    """The ring, by hand, at a head whose guesses are right at first and then wrong."""
    asked = prompt(3, 20)
    plain = replies(model, asked, SETTINGS["greedy"], drafts=0)
    text = [*asked, *(token.token_id for token in plain)]
    config = EngineConfig(cache_tokens=512, page_size=16)
    first = Engine(load_span(directory, Span(0, 2), dtype="float32"), config)
    last = Engine(load_span(directory, Span(2, 4), dtype="float32"), config, EngineParts(guess=knowing(text, right=2)))
    answered: list[Token] = []
    tokens, start, drafts, steps = asked, 0, 0, 0
    while not answered or answered[-1].finish is None:
        steps += 1
        out: list[Reply] = []
        first.receive(Step("a", start, tokens, settings=SETTINGS["greedy"], drafts=drafts), out.append)
        first.run_once()
        (hidden,) = out
        assert isinstance(hidden, Hidden)
        assert (hidden.drafts, hidden.tokens) == (drafts, tuple(tokens))
        came: list[Reply] = []
        step = Step("a", start, hidden.hidden, settings=SETTINGS["greedy"], tokens=hidden.tokens, drafts=hidden.drafts)
        last.receive(step, came.append)
        last.run_once()
        for engine in (first, last):
            engine.check_integrity()
        drawn = [reply for reply in came if isinstance(reply, Token)]
        assert [token.more for token in drawn] == [True] * (len(came) - 1) + [False]
        # What is asked when a message may have been lost: both have computed the same rows.
        assert first.whereabouts("a", 0) == last.whereabouts("a", 0) == (start + len(tokens), 0)
        answered += drawn
        tokens, start, drafts = [answered[-1].token_id, *answered[-1].drafts], answered[-1].position, len(answered[-1].drafts)
    assert [msgspec.structs.replace(token, more=False, drafts=()) for token in answered] == plain
    assert steps < LENGTH / 2


def test_a_server_that_lost_the_session_says_so_to_guesses_too(directory: Path) -> None:
    engine = Engine(load_span(directory, Span(0, 2), dtype="float32"))
    out: list[Reply] = []
    engine.receive(Step("a", 7, [5, 6, 7], drafts=2), out.append)
    engine.run_once()
    assert out == [Gap("a", 0, 0)]


def test_random_guesses_and_random_pools(model: SpanModel) -> None:
    """Many short runs of sessions that come and go; seeds are named by the failure."""
    prompts = [prompt(i, 3 + 5 * i) for i in range(6)]
    plain = [[token.token_id for token in replies(model, tokens, SETTINGS["drawn"], drafts=0)] for tokens in prompts]
    for seed in range(12):
        rng = random.Random(seed)

        def wild(history: Sequence[int], token: int, most: int, rng: random.Random = rng) -> tuple[int, ...]:
            oracle = knowing(*([*asked, *answer] for asked, answer in zip(prompts, plain, strict=True)), right=rng.randint(0, 4))
            return oracle(history, token, rng.randint(0, most))

        driver = Driver(model, wild, cache_tokens=16 * rng.randint(5, 12), page_size=16, step_rows=rng.randint(1, 20))
        driver.engine.config = replace(driver.engine.config, drafts=rng.randint(1, 7))
        waiting = list(range(6))
        rng.shuffle(waiting)
        while waiting:
            session = waiting.pop()
            driver.send(str(session), prompts[session], settings=SETTINGS["drawn"])
            driver.run(turns=rng.randint(1, 30))
        driver.run()
        assert [driver.tokens(str(i)) for i in range(6)] == plain, f"seed {seed}"
