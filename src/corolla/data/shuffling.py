"""Articles in an order that a seed decides, in memory or on disk: the order is the same.

Each article has a key, the SplitMix64 (Steele, Lea and Flood, 2014) of the seed and its number, and they are sorted by it. What does
not fit in memory is first divided among files by the keys' upper bits, then each file is sorted by itself: everything
is read and written from front to back, twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corolla.data.chunks import save
from corolla.data.vector_packing import EMPTY, Articles, chained
from corolla.errors import StorageError

Keys = npt.NDArray[np.uint64]

IN_MEMORY = 16 * 2**20  # bytes of articles that are sorted at once; ten times this is needed for it
_MOST_FILES = 1024  # then what is sorted at once grows


class Keyed(NamedTuple):
    """Articles and a key for each, uint64 `[A]`."""

    keys: Keys
    articles: Articles


def shuffle_keys(numbers: Keys, seed: int) -> Keys:
    """The keys of the articles of these numbers."""
    with np.errstate(over="ignore"):
        return _mixed(numbers ^ _mixed(np.array([seed], np.uint64)))


def in_order(stream: Iterable[Keyed], nbytes: int, directory: Path, *, at_once: int = IN_MEMORY) -> Iterator[Articles]:
    """The articles of `stream` sorted by their keys, in blocks. `nbytes` is about how large all are.

    More than `at_once` bytes go through files in `directory`, which is emptied before and removed afterwards.
    Raises `StorageError` when the disk refuses.
    """
    buckets = min(_MOST_FILES, -(-nbytes // at_once))
    if buckets <= 1:
        yield _sorted(stream)
        return
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _divide(stream, directory, buckets, at_once)
        for bucket in range(buckets):
            path = directory / str(bucket)
            yield _sorted(_read(path))
            path.unlink(missing_ok=True)
        directory.rmdir()
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror or error}") from None


def _mixed(numbers: Keys) -> Keys:
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _sorted(stream: Iterable[Keyed]) -> Articles:
    parts = list(stream)
    if not parts:
        return EMPTY
    keys, articles = np.concatenate([part.keys for part in parts]), chained([part.articles for part in parts])
    parts.clear()
    return articles.take(np.argsort(keys, kind="stable"))


def _divide(stream: Iterable[Keyed], directory: Path, buckets: int, at_once: int) -> None:
    waiting: list[list[Keyed]] = [[] for _ in range(buckets)]
    nbytes = 0
    for keys, articles in stream:
        place = (keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)
        order = np.argsort(place, kind="stable")
        bounds = np.searchsorted(place[order], np.arange(buckets + 1, dtype=np.uint64))
        for bucket in np.flatnonzero(np.diff(bounds)).tolist():
            chosen = order[bounds[bucket] : bounds[bucket + 1]]
            waiting[bucket].append(Keyed(keys[chosen], articles.take(chosen)))
        nbytes += articles.ids.nbytes + articles.kinds.nbytes
        if nbytes > at_once:
            _flush(waiting, directory)
            nbytes = 0
    _flush(waiting, directory)


def _flush(waiting: list[list[Keyed]], directory: Path) -> None:
    for bucket, parts in enumerate(waiting):
        if parts:
            keys, articles = np.concatenate([part.keys for part in parts]), chained([part.articles for part in parts])
            with (directory / str(bucket)).open("ab") as file:
                for array in (keys, articles.ids, articles.kinds, articles.lengths, articles.categories):
                    save(file, array)
            parts.clear()


def _read(path: Path) -> Iterator[Keyed]:
    if not path.exists():
        return
    with path.open("rb") as file:
        size = path.stat().st_size
        while file.tell() < size:
            keys, ids, kinds, lengths, categories = (np.load(file, allow_pickle=False) for _ in range(5))
            yield Keyed(keys, Articles(ids, kinds, lengths, categories))
