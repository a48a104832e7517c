"""Prepared data for a trainer: sequences by their number, with labels and with positions that begin again in each article."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import numpy as np
import numpy.typing as npt

from corolla.data.hdf5 import SequenceFile
from corolla.data.layout import Part, part_files, read_metadata
from corolla.data.packing import unpack
from corolla.data.saving import check_sums
from corolla.data.tokens import IGNORED, Tokens
from corolla.errors import DataError

Numbers = npt.NDArray[np.int64]


class Item(TypedDict):
    """One sequence, int64 `[T]` each.

    `labels` are the ids where they are trained on, else -100; the shift by one is the model's. `position_ids` count from 0 in
    each article; padding is an article of its own.
    """

    input_ids: Numbers
    labels: Numbers
    position_ids: Numbers


class PackedDataset:
    """A part of what `corolla prepare` wrote into `directory`: `len`, `[index]`, iteration; what `torch`'s loaders take.

    With `verify` every file's SHA-256 sum is checked first; say no for the files of other tools, which have none.
    Raises `DataError` when the part is missing, empty, not finished or damaged; reading may raise it too.
    """

    def __init__(self, directory: Path, part: Part = "train", *, verify: bool = True) -> None:
        self.directory = directory
        paths = part_files(directory, part)
        if not paths:
            raise DataError(f"{directory} has no {part} part: prepare the data with one")
        if verify:
            check_sums(directory)
        self._files: list[SequenceFile] = []
        try:
            self._files += map(SequenceFile, paths)
            if len({file.max_length for file in self._files}) > 1:
                raise DataError(f"{directory} has sequences of several lengths: prepare the data again")
        except DataError:
            self.close()
            raise
        self._count = sum(map(len, self._files))
        if not self._count:
            raise DataError(f"the {part} part of {directory} has no sequences: prepare more data")

    @property
    def max_length(self) -> int:
        """The length of each sequence, in tokens."""
        return self._files[0].max_length

    @property
    def metadata(self) -> dict[str, Any]:
        """What metadata.yaml says. Raises `DataError` when it is missing or damaged."""
        return read_metadata(self.directory)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        return item(self.sequence(index))

    def __iter__(self) -> Iterator[Item]:
        return map(item, self.sequences())

    def sequence(self, index: int) -> Tokens:
        """A sequence by its number."""
        if not -self._count <= index < self._count:
            raise IndexError(index)
        row, number = divmod(index % self._count, len(self._files))
        return self._files[number][row]

    def sequences(self) -> Iterator[Tokens]:
        """All sequences, in the order in which they were packed, each file read from front to back."""
        streams = [iter(file) for file in self._files]
        for index in range(self._count):
            yield next(streams[index % len(streams)])

    def articles(self) -> Iterator[Tokens]:
        """Every article on its own, for what cannot mask across articles; see `packing.unpack`."""
        return unpack(self.sequences(), self.metadata.get("packing", "greedy"))

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def item(sequence: Tokens) -> Item:
    """A sequence as a trainer wants it. An article's first token is no label: nothing before it may tell what it is."""
    positions = positions_of(sequence)
    labels = sequence.labels.astype(np.int64)
    labels[positions == 0] = IGNORED
    return Item(input_ids=sequence.input_ids.astype(np.int64), labels=labels, position_ids=positions)


def positions_of(sequence: Tokens) -> Numbers:
    """The place of each token in its article, from 0: int64 `[T]`."""
    places = np.arange(len(sequence), dtype=np.int64)
    segments = sequence.segments
    begins = np.concatenate([[True], segments[1:] != segments[:-1]])[: len(sequence)]
    return places - np.maximum.accumulate(np.where(begins, places, 0))
