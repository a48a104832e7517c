"""Blocks of articles pack as articles one by one do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.data.packing import Packing, PackingSettings, pack
from corolla.data.tokens import Kind, Tokens
from corolla.data.vector_packing import EMPTY, Articles, BlockPacker, PackedRows, chained

LENGTH, PAD = 8, 99


@st.composite
def some_articles(draw: st.DrawFn, longest: int) -> list[Tokens]:
    found = []
    for length in draw(st.lists(st.integers(1, longest), max_size=25)):
        kinds = np.full(length, Kind.COMPLETION, np.int32)
        kinds[: draw(st.integers(0, length - 1))], kinds[-1] = Kind.PROMPT, Kind.END
        ids = np.array(draw(st.lists(st.integers(0, PAD), min_size=length, max_size=length)), np.int32)
        found.append(Tokens(ids, kinds, np.full(length, draw(st.integers(-1, 2)), np.int32)))
    return found


def block(articles: Sequence[Tokens]) -> Articles:
    return chained(
        [EMPTY, *(Articles(a.input_ids, a.token_type_ids.astype(np.uint8), np.array([len(a)]), a.category_ids[:1]) for a in articles)]
    )


def listed(rows: Sequence[PackedRows]) -> list[list[list[int]]]:
    return [[column[row].tolist() for column in each] for each in rows for row in range(len(each.ids))]


@pytest.mark.parametrize("packing", ["full", "greedy", "single"])
@given(data=st.data())
def test_blocks_pack_as_articles_one_by_one(packing: Packing, data: st.DataObject) -> None:
    articles = data.draw(some_articles(3 * LENGTH if packing == "full" else LENGTH))
    settings = PackingSettings(max_length=LENGTH, pad_id=PAD, packing=packing)
    packer, cuts = BlockPacker(settings), sorted(data.draw(st.lists(st.integers(0, len(articles)), max_size=4)))
    rows = [packer.add(block(articles[start:end])) for start, end in zip([0, *cuts], [*cuts, len(articles)], strict=True)]
    expected = [[column.tolist() for column in sequence.columns] for sequence in pack(articles, settings)]
    assert listed([*rows, packer.finish()]) == expected


@given(articles=some_articles(5), data=st.data())
def test_articles_in_another_order(articles: list[Tokens], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(articles))))
    taken = block(articles).take(np.array(order, np.int64))
    expected = block([articles[number] for number in order])
    assert taken.ids.tolist() == expected.ids.tolist()
    assert taken.categories.tolist() == expected.categories.tolist()
    assert taken.part(0, len(order)).lengths.tolist() == expected.lengths.tolist()
