from __future__ import annotations

from typing import Any

import pytest

from corolla import errors
from corolla.client.reply_validation import Asked, ReplyFrame, believed, problem_of, shown, suspects
from corolla.errors import Busy, CorollaError, InvalidSetting, PromptTooLong, ServerFault
from corolla.messages import FailedFrame, Gap, HopTiming, Score, Scores, Token
from corolla.swarm.convert import error_of
from corolla.types import FinishReason, GenerationSettings

SETTINGS = GenerationSettings(max_tokens_to_generate=4, top_logprobs=1, prompt_logprobs=True, stop_token_ids=(9,))
ASKED = Asked(start=10, end=20, settings=SETTINGS, vocabulary=100)
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CorollaError)]
FROM_SERVERS = {
    "ActivationsGone",
    "AdapterNeeded",
    "Busy",
    "CapacityError",
    "EmptyPrompt",
    "InvalidSetting",
    "NetworkError",
    "PromptNeeded",
    "PromptTooLong",
    "ProtocolError",
    "ServerFault",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_is_believed_its_own_errors_and_no_others(kind: type[CorollaError]) -> None:
    error = believed(error_of(FailedFrame("s", 1, kind.__name__, "no")))
    assert type(error) is (kind if kind.__name__ in FROM_SERVERS else ServerFault)
    assert "a server " in str(error)


def test_what_an_error_carries_is_kept() -> None:
    assert believed(InvalidSetting("top_k", "no")).setting == "top_k"  # type: ignore[attr-defined]
    assert believed(InvalidSetting("\x1b[31m", "no")).setting == "[31m"  # type: ignore[attr-defined]
    assert believed(PromptTooLong(9, 8)).limit == 8  # type: ignore[attr-defined]
    assert believed(Busy(0.5)).retry_after == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\nlines\r\n", "two lines"),
        ("\x1b[31mred\x07", "[31mred"),
        ("turned \u202e round", "turned round"),
        ("half a pair \ud800", "half a pair"),
        ("naïve 你好", "naïve 你好"),
        ("", ""),
    ],
)
def test_the_words_of_strangers_are_one_printable_line(text: str, line: str) -> None:
    assert shown(text) == line


def test_long_words_are_cut() -> None:
    assert len(shown("x" * 10**6)) == 400


def token(position: int = 20, token_id: int = 1, **fields: Any) -> Token:
    return Token("s", 1, position, token_id, fields.pop("logprob", -0.5), **fields)


def scores(start: int, count: int, *alternatives: tuple[int, float]) -> Scores:
    return Scores("s", 1, start, (Score(-0.5, alternatives),) * count)


def of(frame: ReplyFrame, *, asked: Asked = ASKED, from_head: bool = True, gaps: float = 0.0) -> str | None:
    return problem_of(frame, asked, from_head=from_head, position=20, gaps=gaps)


HONEST = [
    token(),
    token(token_id=99, top_logprobs=((99, -0.5),)),
    token(position=23, finish=FinishReason.LENGTH),
    token(token_id=9, finish=FinishReason.STOP),
    token(finish=FinishReason.LENGTH),  # where the context ends
    token(position=21),  # the one before may have been lost
    scores(11, 9, (3, -0.5)),
    Gap("s", 1, 10),
    Gap("s", 1, 0),
    Gap("s", 1, 23),  # a chunk, or a token of the ring, may have been lost
]


@pytest.mark.parametrize("frame", HONEST)
def test_what_honest_servers_answer_is_believed(frame: ReplyFrame) -> None:
    assert of(frame) is None


LIES = [
    token(token_id=100),
    token(position=23),
    token(position=24, finish=FinishReason.LENGTH),
    token(token_id=9),
    token(token_id=9, finish=FinishReason.LENGTH),
    token(finish=FinishReason.STOP),
    token(logprob=float("-inf")),
    token(top_logprobs=((1, -0.5), (2, -1.5))),
    token(top_logprobs=((100, -0.5),)),
    token(top_logprobs=((1, float("-inf")),)),
    scores(10, 1),
    scores(11, 10),
    scores(11, 0),
    scores(11, 1, (2**40, -0.5)),
    Gap("s", 1, 24),
]


@pytest.mark.parametrize("frame", LIES)
def test_what_they_do_not_answer_is_not(frame: ReplyFrame) -> None:
    assert of(frame) is not None


def test_what_nobody_asked_for() -> None:
    plain = Asked(10, 20, GenerationSettings(), None)
    assert of(scores(11, 1), asked=plain)
    assert of(token(), asked=Asked(10, 20, None, None))
    assert of(token(token_id=2**40), asked=plain)
    assert of(token(), from_head=False)
    timings = (HopTiming("s", 0.0, 0.1, 0.0),)
    assert of(token(timings=timings))
    assert of(token(timings=timings), asked=Asked(10, 20, SETTINGS, 100, timed=("s",))) is None
    assert of(Gap("s", 1, 0), from_head=False, gaps=16) is None
    assert of(Gap("s", 1, 0), from_head=False, gaps=17)


@pytest.mark.parametrize(
    ("cached", "expected"),
    [
        ((5, 5, 5), ["c"]),  # the head keeps the next token back
        ((4, 4, 4), ["c", "a"]),  # it gave the last one to the client, and the first server has it not
        ((5, 0, 0), ["a", "b"]),
        ((5, 5, 0), ["b", "c"]),
        ((4, 5, 5), ["c", "a"]),
    ],
)
def test_whom_a_standstill_makes_suspect(cached: tuple[int, ...], expected: list[str]) -> None:
    said = {peer: (count, 0) for peer, count in zip("abc", cached, strict=True)}
    assert suspects("abc", said, 5) == expected


def test_a_server_that_holds_all_blocks_is_suspect_alone() -> None:
    assert suspects("a", {"a": (4, 0)}, 5) == ["a"]
