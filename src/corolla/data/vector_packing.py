"""Many articles at once, as a few arrays: what `packing.pack` does one by one, at the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corolla.data.packing import PackingSettings
from corolla.data.tokens import Ids, Kind

Kinds = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Articles:
    """Articles one after another: their tokens and the tokens' kinds, `[T]`; their lengths and categories, int32 `[A]`.

    A category is -1 where there is none.
    """

    ids: Ids
    kinds: Kinds
    lengths: Ids
    categories: Ids

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Places:
        """Where each begins, and where the last one ends: `[A + 1]`."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def take(self, order: Places) -> Articles:
        """The articles of these numbers, in this order."""
        lengths = self.lengths[order]
        tokens = _spread(self.starts[order], lengths)
        return Articles(self.ids[tokens], self.kinds[tokens], lengths, self.categories[order])

    def part(self, first: int, end: int) -> Articles:
        """The articles from `first` to before `end`."""
        tokens = slice(int(self.lengths[:first].sum(dtype=np.int64)), int(self.lengths[:end].sum(dtype=np.int64)))
        return Articles(self.ids[tokens], self.kinds[tokens], self.lengths[first:end], self.categories[first:end])

    def after(self, token: int) -> Articles:
        """What follows the first `token` tokens; the article that is cut there stays with its rest."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        first = int(np.searchsorted(ends, token, side="right"))
        lengths = self.lengths[first:].copy()
        if len(lengths):
            lengths[0] = ends[first] - token
        return Articles(self.ids[token:], self.kinds[token:], lengths, self.categories[first:])


EMPTY = Articles(np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0, np.int32))


def chained(parts: Sequence[Articles]) -> Articles:
    """The articles of all parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    return Articles(
        np.concatenate([EMPTY.ids, *(part.ids for part in parts)]),
        np.concatenate([EMPTY.kinds, *(part.kinds for part in parts)]),
        np.concatenate([EMPTY.lengths, *(part.lengths for part in parts)]),
        np.concatenate([EMPTY.categories, *(part.categories for part in parts)]),
    )


class PackedRows(NamedTuple):
    """Packed sequences: ids int32, kinds uint8, categories int32, `[N, max_length]` each."""

    ids: Ids
    kinds: Kinds
    categories: Ids


class BlockPacker:
    """Packs as `packing.pack` does, a block of articles after another; a test holds that both give the same.

    The articles are as `render` makes them with the same `max_length` (without one for `full`).
    """

    def __init__(self, settings: PackingSettings) -> None:
        self._settings = settings
        self._waiting = EMPTY

    def add(self, articles: Articles) -> PackedRows:
        """The sequences that are complete with these articles; what is left waits for more."""
        waiting = chained([self._waiting, articles])
        starts, length = self._starts(waiting), self._settings.max_length
        if self._settings.packing == "full":
            count = int(waiting.starts[-1]) // length
            whole = count * length
        else:
            count = int(starts[-1]) // length + (self._settings.packing == "single") if len(waiting) else 0
            whole = int(waiting.starts[np.searchsorted(starts, count * length)])
        self._waiting = waiting.after(whole)
        return self._rows(waiting, starts, whole, count)

    def finish(self) -> PackedRows:
        """The last sequence, if anything is left for it."""
        left, self._waiting = self._waiting, EMPTY
        return self._rows(left, left.starts[:-1], len(left.ids), min(1, len(left)))

    def _starts(self, articles: Articles) -> Places:
        """Where each begins in a stream of sequences, `[A]`."""
        length = self._settings.max_length
        if self._settings.packing == "full":
            return articles.starts[:-1]
        if self._settings.packing == "single":
            return np.arange(len(articles), dtype=np.int64) * length
        starts, row, used = [], 0, 0
        for tokens in articles.lengths.tolist():
            if used + tokens > length:
                row, used = row + length, 0
            starts.append(row + used)
            used += tokens
        return np.array(starts, np.int64)

    def _rows(self, articles: Articles, starts: Places, tokens: int, count: int) -> PackedRows:
        """`count` sequences of the first `tokens` tokens of the articles."""
        shape = (count, self._settings.max_length)
        rows = PackedRows(
            np.full(shape, self._settings.pad_id, np.int32), np.full(shape, Kind.PADDING, np.uint8), np.full(shape, -1, np.int32)
        )
        places = _spread(starts, articles.lengths)[:tokens]
        rows.ids.ravel()[places] = articles.ids[:tokens]
        rows.kinds.ravel()[places] = articles.kinds[:tokens]
        if len(articles) and articles.categories.max() >= 0:
            rows.categories.ravel()[places] = np.repeat(articles.categories, articles.lengths)[:tokens]
        return rows


def _spread(starts: Places, lengths: Ids) -> Places:
    """For each start as many places from there on as its length says."""
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum(dtype=np.int64)), dtype=np.int64)
