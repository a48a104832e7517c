"""Chunks of articles on disk, between tokenizing and packing. Each is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from corolla.data.examples import Place
from corolla.data.render import RenderCounts
from corolla.data.saving import replacing
from corolla.data.vector_packing import Articles


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a chunk tells beside its articles.

    `tokens` and `articles` are counts for each part; `problems` the examples that could not be rendered; `categories` the names that
    the articles' categories are the numbers of.
    """

    counts: RenderCounts
    problems: list[tuple[Place, str]] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    articles: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def write_chunk(path: Path, articles: Articles, parts: npt.NDArray[np.uint8], summary: Summary) -> None:
    """Write articles, with the number of the part that each belongs to, `[A]`. Raises `StorageError`."""
    header = np.frombuffer(json.dumps(asdict(summary)).encode(), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for array in (header, articles.lengths, articles.categories, parts, articles.ids, articles.kinds):
            save(file, array)


def read_summary(path: Path) -> Summary:
    """What a chunk tells beside its articles."""
    with path.open("rb") as file:
        return _summary(file)


def read_chunk(path: Path) -> tuple[Articles, npt.NDArray[np.uint8], Summary]:
    """The articles of a chunk, the number of the part that each belongs to, and the rest."""
    with path.open("rb") as file:
        summary = _summary(file)
        lengths, categories, parts, ids, kinds = (np.load(cast(IO[bytes], file), allow_pickle=False) for _ in range(5))
    return Articles(ids, kinds, lengths, categories), parts, summary


def save(file: IO[bytes], array: npt.NDArray[Any]) -> None:
    """Write an array as `numpy.save` does, but with the system's own error where the disk is full."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(np.ascontiguousarray(array).data)


def chunk_path(directory: Path, number: int) -> Path:
    """Where a chunk lies, by its number from 0."""
    return directory / f"{number:08d}.articles"


def numbered_keys(chunk: int, count: int) -> npt.NDArray[np.uint64]:
    """A number for each of the `count` articles of a chunk that no other article of any chunk has, ascending: `[A]`."""
    return (np.uint64(chunk) << np.uint64(32)) + np.arange(count, dtype=np.uint64)


def _summary(file: IO[bytes]) -> Summary:
    fields = json.loads(np.load(file, allow_pickle=False).tobytes())
    problems: Sequence[tuple[tuple[str, int], str]] = fields.pop("problems")
    counts = RenderCounts(**fields.pop("counts"))
    return Summary(counts=counts, problems=[(Place(*place), said) for place, said in problems], **fields)
