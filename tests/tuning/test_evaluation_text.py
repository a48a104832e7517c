from __future__ import annotations

from pathlib import Path

import pytest
import toy

from corolla.client.tokenizer import TextTokenizer
from corolla.errors import DataError
from corolla.tuning.evaluation_text import describe_answers, distinct, tokens_per_word


def test_tokens_per_word(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(toy.make_directory(tmp_path, toy.byte_level()))
    text = "The capital of France\nis Paris."
    assert tokens_per_word(tokenizer, text) == len(tokenizer.encode(text)) / 6
    with pytest.raises(DataError, match="without words"):
        tokens_per_word(tokenizer, " \n")


def test_distinct_n_by_hand() -> None:
    assert distinct(["a b a b", "a b"], 1) == 2 / 6
    assert distinct(["a b a b", "a b"], 2) == 2 / 4  # ab ba ab, ab
    assert distinct(["a"], 2) == 0.0


def test_answers_are_described() -> None:
    answers = describe_answers(["yes", "yes", "no idea at all"], [2, 2, 8], [True, True, False])
    assert answers.distinct[1] == 5 / 6
    assert (answers.mean_length, answers.median_length, answers.longest) == (4, 2, 8)
    assert answers.ended == pytest.approx(2 / 3)
