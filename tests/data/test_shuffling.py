"""The order that a seed decides, in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from corolla.data.chunks import numbered_keys
from corolla.data.shuffling import Keyed, in_order, shuffle_keys
from corolla.data.vector_packing import Articles, chained
from corolla.errors import StorageError

COUNT = 500


def stream(seed: int) -> Iterator[Keyed]:
    """Three chunks of articles of one to four tokens, each made of its own number."""
    for chunk in range(3):
        lengths = np.arange(COUNT, dtype=np.int32) % 4 + 1
        ids = np.repeat(np.arange(COUNT, dtype=np.int32) + chunk * COUNT, lengths)
        articles = Articles(ids, np.ones(len(ids), np.uint8), lengths, np.zeros(COUNT, np.int32))
        yield Keyed(shuffle_keys(numbered_keys(chunk, COUNT), seed), articles)


def order(seed: int, directory: Path, at_once: int) -> list[int]:
    shuffled = chained(list(in_order(stream(seed), 20_000, directory, at_once=at_once)))
    return shuffled.ids[shuffled.starts[:-1]].tolist()


@pytest.mark.parametrize("at_once", [10_000, 300])
def test_on_disk_the_order_is_that_in_memory(tmp_path: Path, at_once: int) -> None:
    assert order(7, tmp_path / "x", at_once) == order(7, tmp_path / "x", 20_000)
    assert not list(tmp_path.iterdir())


def test_every_article_comes_once_and_elsewhere(tmp_path: Path) -> None:
    found = order(7, tmp_path, 20_000)
    assert sorted(found) == list(range(3 * COUNT))
    assert sum(place == number for place, number in enumerate(found)) < 20
    assert found != order(8, tmp_path, 20_000)


def test_the_keys_are_those_of_splitmix64() -> None:
    # The published generator's first number from the state 0; against the same from the seed 0, the state is 0 again.
    first = 0xE220A8397B1DCDAF
    assert shuffle_keys(np.array([first], np.uint64), 0).tolist() == [first]


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="x cannot be written: "):
        order(7, tmp_path / "file" / "x", 300)
