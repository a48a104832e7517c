from __future__ import annotations

import pytest

from corolla.client.reply_progress import ReplyProgress
from corolla.client.reply_validation import MOST_GAPS, Asked
from corolla.messages import Gap, Score, Scores, Token
from corolla.types import GenerationSettings

SCORED = GenerationSettings(prompt_logprobs=True)
GAP = Gap("s", 1, 0)


def token(position: int) -> Token:
    return Token("s", 1, position, 1, -0.5)


def scores(start: int, count: int) -> Scores:
    return Scores("s", 1, start, (Score(-0.5),) * count)


@pytest.fixture
def answers() -> ReplyProgress:
    answers = ReplyProgress()
    answers.begin(Asked(10, 20, SCORED, None))
    return answers


def test_scores_come_in_order_and_before_the_answer(answers: ReplyProgress) -> None:
    assert answers.is_ahead(scores(12, 4))
    assert answers.is_ahead(token(20))
    answers.get_on(scores(11, 5))
    assert answers.is_repeated(scores(11, 5))
    assert answers.is_repeated(scores(11, 1))
    assert not answers.is_repeated(scores(13, 5))
    answers.get_on(scores(16, 4))
    assert not answers.is_ahead(token(20))


def test_tokens_come_in_order(answers: ReplyProgress) -> None:
    answers.get_on(scores(11, 9))
    answers.get_on(token(20))
    assert answers.is_repeated(token(20))
    assert not answers.is_ahead(token(21))
    assert answers.is_ahead(token(22))


def test_gaps_are_made_up_for_by_tokens(answers: ReplyProgress) -> None:
    for _ in range(MOST_GAPS):
        assert answers.problem_of(GAP, from_head=True) is None
    for position in range(20, 24):
        answers.get_on(token(position))
    assert answers.problem_of(GAP, from_head=True) is None
    assert not answers.keeps_back(GAP)
    assert answers.problem_of(GAP, from_head=True) is not None
    assert answers.keeps_back(GAP)


def test_a_setback_is_forgotten_after_many_tokens(answers: ReplyProgress) -> None:
    assert answers.set_back() == 1
    for position in range(20, 30):
        answers.get_on(token(position))
    assert answers.set_back() == 2
    for position in range(30, 100):
        answers.get_on(token(position))
    assert answers.set_back() == 1
