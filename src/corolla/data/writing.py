"""Chunks of articles as a part's files of sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from corolla.data.chunks import chunk_path, numbered_keys, read_chunk
from corolla.data.hdf5 import FIELDS, SequenceWriter, writing
from corolla.data.layout import PARTS, Part, file_names
from corolla.data.packing import PackingSettings
from corolla.data.shuffling import Keyed, shuffle_keys
from corolla.data.tokens import Kind
from corolla.data.vector_packing import Articles, BlockPacker, PackedRows

_AT_ONCE = 2**21  # tokens that are packed at once
_BUFFERS = 2**24  # bytes of the chunks that all files gather


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """A part's articles in the `count` chunks of a directory; `categories` are the numbers of their categories by name."""

    directory: Path
    count: int
    part: Part
    categories: Mapping[str, int]

    def keyed(self, seed: int) -> Iterator[Keyed]:
        """The articles of a chunk after another, with their keys for an order that the seed decides."""
        number = PARTS.index(self.part)
        for chunk in range(self.count):
            articles, parts, summary = read_chunk(chunk_path(self.directory, chunk))
            chosen = np.flatnonzero(parts == number)
            articles = articles if len(chosen) == len(articles) else articles.take(chosen)
            numbers = np.array([*(self.categories.get(name, -1) for name in summary.categories), -1], np.int32)  # -1 is the last one
            keys = shuffle_keys(numbered_keys(chunk, len(parts)), seed)[chosen]
            yield Keyed(keys, replace(articles, categories=numbers[articles.categories]))


def packed(blocks: Iterable[Articles], settings: PackingSettings) -> Iterator[PackedRows]:
    """The sequences of all articles, some at a time."""
    packer = BlockPacker(settings)
    for block in blocks:
        used = np.full(len(block), settings.max_length) if settings.packing == "single" else block.lengths
        steps = np.cumsum(used, dtype=np.int64) // _AT_ONCE
        bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(block)]
        for first, end in pairwise(bounds):
            yield packer.add(block.part(first, end))
    yield packer.finish()


def with_training(rows: PackedRows) -> PackedRows:
    """The sequences of which something is trained on."""
    trained = ((rows.kinds == Kind.COMPLETION) | (rows.kinds == Kind.END)).any(axis=1)
    return rows if trained.all() else PackedRows(*(column[trained] for column in rows))


class PartWriter:
    """Deals sequences to a part's files, one to each in turn; see `part_writer`."""

    def __init__(self, writers: Sequence[SequenceWriter], fields: int) -> None:
        self._writers = writers
        self._fields = fields
        self._count = 0

    @property
    def counts(self) -> list[int]:
        """How many sequences each file has, once all are written."""
        return [writer.count for writer in self._writers]

    def add(self, rows: PackedRows) -> None:
        """Write some sequences."""
        for number, writer in enumerate(self._writers):
            first = (number - self._count) % len(self._writers)
            writer.add([column[first :: len(self._writers)] for column in rows[: self._fields]])
        self._count += len(rows.ids)


@contextmanager
def part_writer(
    directory: Path, part: Part, files: int, max_length: int, threads: ThreadPoolExecutor, *, categories: bool
) -> Iterator[PartWriter]:
    """Writes a part's `files` into `directory`: all of them are there after a good end only. Raises `StorageError`."""
    fields = FIELDS if categories else FIELDS[:2]
    chunk_bytes = min(2**20, _BUFFERS // (files * len(fields)))
    with ExitStack() as stack:
        paths = [directory / name for name in file_names(part, files)]
        writers = [stack.enter_context(writing(path, max_length, fields, threads, chunk_bytes=chunk_bytes)) for path in paths]
        yield PartWriter(writers, len(fields))
