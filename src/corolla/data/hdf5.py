"""Packed sequences in HDF5 files, with the fields that BLOOMChat's tools read and write.

`input_ids` and `token_type_ids`, and `category_ids` where there are categories: int32 `[N, max_length]`, gzip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py  # type: ignore[import-untyped]
import numpy as np

from corolla.data.saving import replacing
from corolla.data.tokens import Ids, Kind, Tokens
from corolla.errors import DataError

FIELDS = ("input_ids", "token_type_ids", "category_ids")  # the order of `Tokens.columns`
_CHUNK_BYTES = 2**20  # of one field, unpacked: what is compressed and read at once


def write_sequences(path: Path, sequences: Iterable[Tokens], max_length: int) -> int:
    """Write `sequences`, each of `max_length` tokens, and return how many they are. The same sequences make the same bytes.

    `path` is there whole or not at all. Raises `StorageError` when the disk refuses, `ValueError` for a sequence of another length.
    """
    chunk = max(1, _CHUNK_BYTES // (4 * max_length))
    stream = iter(sequences)
    rows = list(islice(stream, chunk))
    fields = FIELDS if rows and rows[0].category_ids is not None else FIELDS[:2]
    total = 0
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        shape, largest = (0, max_length), (None, max_length)
        options = {"dtype": "i4", "chunks": (chunk, max_length), "compression": "gzip", "track_times": False}
        datasets = [file.create_dataset(name, shape=shape, maxshape=largest, **options) for name in fields]
        while rows:
            total += len(rows)
            for index, dataset in enumerate(datasets):
                dataset.resize(total, axis=0)
                dataset[-len(rows) :] = np.stack([_column(row, index, max_length) for row in rows])
            rows = list(islice(stream, chunk))
    return total


class SequenceFile:
    """The sequences of one file, read as they are asked for: `len`, `[index]`, iteration. A context manager.

    Raises `DataError` for a file that is missing, cut short, or has not the fields of this format; reading may raise it too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path} does not exist: prepare the data first")
        try:
            self._file = h5py.File(path, "r", locking="best-effort")
        except OSError as error:
            raise DataError(f"{path} is no whole HDF5 file ({error}): prepare the data again") from None
        try:
            self._datasets = self._checked()
        except DataError:
            self._file.close()
            raise

    def __len__(self) -> int:
        return int(self._datasets[0].shape[0])

    @property
    def max_length(self) -> int:
        """The length of each sequence, in tokens."""
        return int(self._datasets[0].shape[1])

    def __getitem__(self, index: int) -> Tokens:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._rows(index, index + 1)[0]

    def __iter__(self) -> Iterator[Tokens]:
        step = self._datasets[0].chunks[0] if self._datasets[0].chunks else 1
        return chain.from_iterable(self._rows(start, min(start + step, len(self))) for start in range(0, len(self), step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _rows(self, start: int, end: int) -> list[Tokens]:
        try:
            columns = [dataset[start:end] for dataset in self._datasets]
        except OSError as error:
            raise DataError(f"{self.path} is damaged at sequence {start} ({error}): prepare the data again") from None
        kinds = columns[1]
        if kinds.min(initial=0) < Kind.PROMPT or kinds.max(initial=0) > Kind.END:
            raise DataError(
                f"{self.path} has token types beyond {Kind.PROMPT} to {Kind.END} from sequence {start} on: prepare the data again"
            )
        return [Tokens(*row) for row in zip(*columns, strict=True)]

    def _checked(self) -> list[Any]:
        named = FIELDS if FIELDS[2] in self._file else FIELDS[:2]
        found = [self._file.get(name) for name in named]
        for name, dataset in zip(named, found, strict=True):
            if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 2 or dataset.dtype != np.int32:
                raise DataError(f"{self.path} has no {name} of int32 in rows: it is no file of packed sequences")
            if dataset.shape != found[0].shape:
                raise DataError(f"{self.path} has {name} of {dataset.shape} beside input_ids of {found[0].shape}: prepare the data again")
        return found


def _column(row: Tokens, index: int, max_length: int) -> Ids:
    column = row.columns[index]
    if column is None or len(column) != max_length:
        raise ValueError(f"every sequence needs {FIELDS[index]} of {max_length} tokens")
    return column
