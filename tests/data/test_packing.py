"""Packing loses, repeats and reorders nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.data.packing import Packing, PackingSettings, Utilization, pack, shuffled, unpack
from corolla.data.tokens import Kind, Tokens, concatenated
from corolla.errors import InvalidSetting

LENGTH, PAD = 8, 99
PACKINGS: tuple[Packing, ...] = ("full", "greedy", "single")


def article(ids: Sequence[int], *, prompt: int = 0, end: bool = True, category: int | None = None) -> Tokens:
    kinds = [Kind.PROMPT] * prompt + [Kind.COMPLETION] * (len(ids) - prompt)
    if end:
        kinds[-1] = Kind.END
    categories = None if category is None else np.full(len(ids), category, np.int32)
    return Tokens(np.array(ids, np.int32), np.array(kinds, np.int32), categories)


def settings_of(packing: Packing) -> PackingSettings:
    return PackingSettings(max_length=LENGTH, pad_id=PAD, packing=packing)


def listed(tokens: Tokens) -> tuple[list[int] | None, ...]:
    return tuple(None if column is None else column.tolist() for column in tokens.columns)


def rows(articles: Sequence[Tokens], packing: Packing) -> list[list[int]]:
    return [sequence.input_ids.tolist() for sequence in pack(articles, settings_of(packing))]


@st.composite
def some_articles(draw: st.DrawFn, longest: int = LENGTH) -> list[Tokens]:
    # PAD and the ids of others may be among an article's own: only kinds tell.
    with_categories = draw(st.booleans())
    articles = []
    for ids in draw(st.lists(st.lists(st.integers(0, PAD), min_size=1, max_size=longest), max_size=30)):
        cut = len(ids) == LENGTH and longest == LENGTH and draw(st.booleans())
        category = draw(st.integers(-1, 3)) if with_categories else None
        articles.append(article(ids, prompt=draw(st.integers(0, len(ids) - 1)), end=not cut, category=category))
    return articles


@pytest.mark.parametrize("packing", ["greedy", "single"])
@given(articles=some_articles())
def test_unpacking_gives_back_every_article(packing: Packing, articles: list[Tokens]) -> None:
    sequences = list(pack(articles, settings_of(packing)))
    assert all(len(sequence) == LENGTH for sequence in sequences)
    assert [*map(listed, unpack(sequences, packing))] == [*map(listed, articles)]


@given(articles=some_articles(longest=3 * LENGTH))
def test_unpacking_gives_back_every_article_of_a_stream(articles: list[Tokens]) -> None:
    articles = [article(each.input_ids.tolist()) for each in articles]
    sequences = list(pack(articles, settings_of("full")))
    assert all(len(sequence) == LENGTH for sequence in sequences)
    assert [*map(listed, unpack(sequences, "full"))] == [*map(listed, articles)]
    assert all(Kind.PADDING not in sequence.token_type_ids for sequence in sequences[:-1])


@given(articles=some_articles())
def test_greedy_leaves_no_room_that_the_next_article_would_fill(articles: list[Tokens]) -> None:
    sequences = list(pack(articles, settings_of("greedy")))
    for sequence, following in pairwise(sequences):
        first = next(unpack([following], "greedy"))
        assert int((sequence.token_type_ids == Kind.PADDING).sum()) < len(first)


@given(articles=some_articles())
def test_utilization_counts_every_token_once(articles: list[Tokens]) -> None:
    figures = Utilization()
    for sequence in pack(articles, settings_of("greedy")):
        figures.add(sequence)
    assert figures.tokens == sum(map(len, articles))
    assert figures.tokens + figures.padding == figures.sequences * LENGTH
    assert 0 <= figures.share <= 1


def test_the_three_ways() -> None:
    articles = [article([1, 2, 3]), article([4, 5, 6]), article([7, 8, 9]), article([10])]
    assert rows(articles, "full") == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, PAD, PAD, PAD, PAD, PAD, PAD]]
    assert rows(articles, "greedy") == [[1, 2, 3, 4, 5, 6, PAD, PAD], [7, 8, 9, 10, PAD, PAD, PAD, PAD]]
    assert rows(articles, "single") == [[*each.input_ids.tolist(), *[PAD] * (LENGTH - len(each))] for each in articles]


def test_kinds_labels_and_segments_of_a_sequence() -> None:
    (sequence,) = pack([article([1, 2, 3], prompt=2, category=5), article([4, 5, 6], prompt=1, category=7)], settings_of("greedy"))
    assert sequence.token_type_ids.tolist() == [0, 0, 3, 0, 1, 3, 2, 2]
    assert sequence.labels.tolist() == [-100, -100, 3, -100, 5, 6, -100, -100]
    assert sequence.segments.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    assert sequence.category_ids is not None
    assert sequence.category_ids.tolist() == [5, 5, 5, 7, 7, 7, -1, -1]
    assert {column.dtype for column in (*sequence.columns, sequence.labels, sequence.segments) if column is not None} == {
        np.dtype(np.int32)
    }


def test_pairs_with_boundaries_of_their_own_are_segments() -> None:
    (sequence,) = pack([concatenated([article([1, 2]), article([3, 4])])], settings_of("single"))
    assert sequence.segments.tolist() == [0, 0, 1, 1, -1, -1, -1, -1]


@pytest.mark.parametrize("packing", PACKINGS)
def test_nothing_packs_to_nothing(packing: Packing) -> None:
    assert not list(pack([], settings_of(packing)))
    assert not list(unpack([], packing))
    assert Utilization().share == 0


@pytest.mark.parametrize("packing", PACKINGS)
def test_sequences_come_before_the_articles_end(packing: Packing) -> None:
    asked = 0

    def articles() -> object:
        nonlocal asked
        while True:
            asked += 1
            yield article([1, 2, 3])

    next(pack(articles(), settings_of(packing)))
    assert asked <= 4


@pytest.mark.parametrize(
    ("packing", "bad", "problem"),
    [
        ("greedy", article([1] * 9), "max_length: an article of 9 tokens does not fit 8"),
        ("single", article([1] * 9), "max_length: an article of 9 tokens does not fit 8"),
        ("greedy", article([1] * 7, end=False), "max_length: an article was cut at 7 tokens"),
        ("full", article([1] * 8, end=False), "max_length: articles that are cut have no end"),
    ],
)
def test_articles_that_cannot_be_packed(packing: Packing, bad: Tokens, problem: str) -> None:
    with pytest.raises(InvalidSetting, match=problem):
        list(pack([bad], settings_of(packing)))


def test_bad_settings() -> None:
    with pytest.raises(InvalidSetting, match="max_length: 0 tokens"):
        PackingSettings(max_length=0, pad_id=0)
    with pytest.raises(InvalidSetting, match="packing: there is no 'tight'; there are full, greedy, single"):
        PackingSettings(max_length=8, pad_id=0, packing="tight")  # type: ignore[arg-type]


@given(items=st.lists(st.integers()), seed=st.integers())
def test_an_order_that_the_seed_decides(items: list[int], seed: int) -> None:
    order = shuffled(items, seed)
    assert order == shuffled(items, seed)
    assert sorted(order) == sorted(items)
    assert shuffled(range(50), 1) != shuffled(range(50), 2)
