"""What texts tell of a tokenizer, and answers of a model; plain counting."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from corolla.client.tokenizer import TextTokenizer
from corolla.errors import DataError


@dataclass(frozen=True, slots=True)
class ReferenceAnswers:
    """`distinct[n]` is the share of different n-grams of words among all of them (Li et al., 2016), from 0 to 1; lengths are in tokens."""

    count: int
    distinct: dict[int, float]
    mean_length: float
    median_length: float
    longest: int
    ended: float  # the share that ended by themselves


def tokens_per_word(tokenizer: TextTokenizer, text: str) -> float:
    """How many tokens a word of `text` takes; words are what stands between blanks. Raises `DataError` for a text without words."""
    words = len(text.split())
    if not words:
        raise DataError("a text without words says nothing of a tokenizer: give one of some pages")
    return len(tokenizer.encode_plain(text)) / words


def distinct(texts: Iterable[str], n: int) -> float:
    """The share of different n-grams of words among all n-grams of the texts; 0 where there is none."""
    grams = [tuple(words[start : start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def describe_answers(texts: Sequence[str], lengths: Sequence[int], ended: Sequence[bool]) -> ReferenceAnswers:
    """Of generated answers: their texts, their lengths in tokens, and whether each ended by itself. At least one."""
    return ReferenceAnswers(
        count=len(texts),
        distinct={n: distinct(texts, n) for n in (1, 2, 3)},
        mean_length=statistics.mean(lengths),
        median_length=statistics.median(lengths),
        longest=max(lengths),
        ended=sum(ended) / len(ended),
    )
