"""Packed sequences in HDF5 files, with the fields that BLOOMChat's tools read and write.

`input_ids` and `token_type_ids`, and `category_ids` where there are categories: int32 `[N, max_length]`, gzip.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from corolla.data.saving import replacing
from corolla.data.tokens import Ids, Kind, Tokens
from corolla.errors import DataError, StorageError

FIELDS = ("input_ids", "token_type_ids", "category_ids")  # the order of `Tokens.columns`
_LEVEL = 4  # of gzip, as h5py has it
_ROWS = 64  # that are gathered from an iteration at once
_AHEAD = 4  # chunks of a file that wait for being compressed


def write_sequences(path: Path, sequences: Iterable[Tokens], max_length: int) -> int:
    """Write `sequences`, each of `max_length` tokens, and return how many they are. The same sequences make the same bytes.

    `path` is there whole or not at all. Raises `StorageError` when the disk refuses, `ValueError` for a sequence of another length.
    """
    stream = iter(sequences)
    rows = list(islice(stream, _ROWS))
    fields = FIELDS if rows and rows[0].category_ids is not None else FIELDS[:2]
    with ThreadPoolExecutor(1) as threads, writing(path, max_length, fields, threads) as writer:
        while rows:
            writer.add([np.stack([_column(row, index, max_length) for row in rows]) for index in range(len(fields))])
            rows = list(islice(stream, _ROWS))
    return writer.count


@contextmanager
def writing(
    path: Path, max_length: int, fields: Sequence[str], threads: ThreadPoolExecutor, *, chunk_bytes: int = 2**20
) -> Iterator[SequenceWriter]:
    """A writer of sequences of `max_length` tokens into `path`, which is there after a good end only.

    `fields` are the first two or all of `FIELDS`, `chunk_bytes` what is compressed at once of each, by `threads`. The same sequences
    make the same bytes, however they are divided among calls and whatever the threads. Raises `StorageError` when the disk refuses.
    """
    with replacing(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                rows = max(1, chunk_bytes // (4 * max_length))
                options = {"dtype": "i4", "chunks": (rows, max_length), "compression": "gzip", "compression_opts": _LEVEL}
                shape = {"shape": (0, max_length), "maxshape": (None, max_length)}
                writer = SequenceWriter([file.create_dataset(name, **shape, **options, track_times=False) for name in fields], threads)
                yield writer
                writer.finish()
        except RuntimeError as error:
            if "errno" not in str(error):  # with it, h5py tells so what the system refused on closing
                raise
            raise StorageError(f"{path} cannot be written: {error}") from None


class SequenceWriter:
    """Writes sequences as they come; see `writing`."""

    def __init__(self, datasets: Sequence[Any], threads: ThreadPoolExecutor) -> None:
        self.count = 0
        self._datasets = datasets
        self._threads = threads
        self._buffers = [np.zeros(dataset.chunks, "<i4") for dataset in datasets]
        self._rows = 0  # in the buffers
        self._compressed: deque[tuple[int, list[Future[bytes]]]] = deque()  # how many rows, and each field's chunk

    def add(self, columns: Sequence[npt.NDArray[np.integer[Any]]]) -> None:
        """Write some sequences: for each field its integers, `[N, max_length]`."""
        start, total = 0, len(columns[0])
        while start < total:
            taken = min(total - start, len(self._buffers[0]) - self._rows)
            for buffer, column in zip(self._buffers, columns, strict=True):
                buffer[self._rows : self._rows + taken] = column[start : start + taken]
            self._rows += taken
            start += taken
            if self._rows == len(self._buffers[0]):
                self._compress()

    def finish(self) -> None:
        """Write what is left."""
        if self._rows:
            self._compress()
        while self._compressed:
            self._write()

    def _compress(self) -> None:
        # The unused rows of the last chunk are never read, and zeros.
        chunks = [np.concatenate([buffer[: self._rows], np.zeros_like(buffer[self._rows :])]).tobytes() for buffer in self._buffers]
        self._compressed.append((self._rows, [self._threads.submit(zlib.compress, chunk, _LEVEL) for chunk in chunks]))
        self.count += self._rows
        self._rows = 0
        while len(self._compressed) > _AHEAD:
            self._write()

    def _write(self) -> None:
        rows, chunks = self._compressed.popleft()
        for dataset, chunk in zip(self._datasets, chunks, strict=True):
            start = dataset.shape[0]
            dataset.resize(start + rows, axis=0)
            dataset.id.write_direct_chunk((start, 0), chunk.result())


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
