from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import toy
from fakes import FakeEngine

from corolla.client.completion import Completion
from corolla.client.session import Session
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import PromptTooLong
from corolla.types import FinishReason, GenerationSettings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(toy.make_directory(tmp_path_factory.mktemp("toy"), toy.byte_level()))


Start = Callable[..., tuple[FakeEngine, Session, Completion]]


@pytest.fixture
def start(tokenizer: TextTokenizer) -> Iterator[Start]:
    engines = []

    def start(answer: str, prompt: str = "hello", **options: object) -> tuple[FakeEngine, Session, Completion]:
        tokens = [*tokenizer.encode(answer), toy.END]
        engine = FakeEngine(lambda history: itertools.chain(tokens, itertools.repeat(5)))
        engines.append(engine)
        session = Session(engine.transport, "fake")
        settings = GenerationSettings.parse(**{"stop_token_ids": (toy.END,), **options})
        return engine, session, Completion(session, tokenizer, tokenizer.encode(prompt), settings)

    yield start
    for engine in engines:
        engine.stop()


def test_an_answer_to_its_end_token(start: Start, tokenizer: TextTokenizer) -> None:
    _engine, session, completion = start("fine, thank you!")
    text = "".join(piece.text for piece in completion)
    result = completion.result
    assert result is not None
    assert result.text == text == "fine, thank you!"
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids == [*tokenizer.encode("fine, thank you!"), toy.END]
    assert result.logprobs == [-1.0 - index for index in range(len(result.token_ids))]
    assert session.tokens == [*tokenizer.encode("hello"), *result.token_ids]
    assert (result.prompt_tokens, result.cached_tokens) == (len(tokenizer.encode("hello")), 0)
    assert 0 < (result.timings.first_token_s or 0) <= result.timings.total_s


def test_an_answer_cut_at_the_limit(start: Start, tokenizer: TextTokenizer) -> None:
    result = start("fine, thank you!", max_new_tokens=2)[2].run()
    assert result.finish_reason is FinishReason.LENGTH
    assert tokenizer.decode(result.token_ids) == result.text


def test_a_stop_sequence_that_straddles_tokens(start: Start, tokenizer: TextTokenizer) -> None:
    _engine, session, completion = start("hello there\n<human>: fine", stop=["<human>"])
    result = completion.run()
    assert result.text == "hello there\n"
    assert result.finish_reason is FinishReason.STOP
    assert tokenizer.decode(session.tokens) == "hellohello there\n"
    assert result.token_ids == session.tokens[result.prompt_tokens :]
    assert len(result.logprobs) == len(result.token_ids)


def test_a_stop_sequence_at_the_very_end(start: Start) -> None:
    answer = start("hello there", stop=["there", "therefore"], max_new_tokens=100)[2].run()
    assert (answer.text, answer.finish_reason) == ("hello ", FinishReason.STOP)


def test_what_only_looked_like_a_stop_comes_out_at_the_end(start: Start) -> None:
    assert start("hello <hum", stop=["<human>"])[2].run().text == "hello <hum"


def test_a_stop_behind_a_multibyte_character(start: Start, tokenizer: TextTokenizer) -> None:
    _engine, session, completion = start("a😀###b", stop=["###"])
    assert completion.run().text == "a😀"
    assert tokenizer.decode(session.tokens) == "helloa😀"


def test_an_interrupted_answer(start: Start, tokenizer: TextTokenizer) -> None:
    _engine, session, completion = start("hello there", stop_token_ids=(), max_new_tokens=10**6)
    text = next(iter(completion)).text
    completion.close()
    assert completion.result is not None
    assert completion.result.finish_reason is None
    assert completion.result.text == text
    assert tokenizer.decode(session.tokens) == "hello" + text


def test_the_session_sends_only_what_is_new(start: Start, tokenizer: TextTokenizer) -> None:
    engine, session, completion = start("fine, thank you!")
    history = [*tokenizer.encode("hello"), *completion.run().token_ids]
    more = tokenizer.encode(" there")
    settings = GenerationSettings(stop_token_ids=(toy.END,))
    result = Completion(session, tokenizer, history + more, settings).run()
    assert result.cached_tokens == len(history)
    assert list(engine.steps[1].payload) == [toy.END, *more]


def test_an_edited_prompt_rolls_back_to_what_is_shared(start: Start, tokenizer: TextTokenizer) -> None:
    engine, session, completion = start("fine, thank you!")
    completion.run()
    edited = [*tokenizer.encode("hello"), 7, 8]
    Completion(session, tokenizer, edited, GenerationSettings(max_tokens_to_generate=1)).run()
    assert (engine.steps[1].start, list(engine.steps[1].payload)) == (len(edited) - 2, [7, 8])
    assert session.tokens[:-1] == edited


def test_an_error_leaves_a_result_too(start: Start) -> None:
    engine, _session, completion = start("fine")
    engine.fail = [PromptTooLong(9, 8)]
    with pytest.raises(PromptTooLong):
        completion.run()
    assert completion.result is not None
    assert completion.result.token_ids == []
    assert completion.result.timings.first_token_s is None
