"""What is read: the files behind the inputs, with their SHA-256 sums, and how far reading has come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from corolla.data.examples import Example
from corolla.data.readers.hub import dataset_named
from corolla.data.readers.read import files_of
from corolla.errors import DataError

if TYPE_CHECKING:
    from corolla.models.checkpoint import Progress

_BLOCK = 2**20
_BY_LINES = (".jsonl", ".ndjson", ".txt", ".csv")  # whose examples are counted by lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file, or a dataset of the hub, which has no file.

    `name` is the file's in its input, the same wherever that lies; `lines` is `None` where examples are not counted by lines.
    """

    name: str
    path: Path | None = None
    nbytes: int = 0
    sha256: str | None = None
    lines: int | None = None


def sources_of(inputs: Sequence[str], progress: Progress) -> list[Source]:
    """The sources of all inputs, in the order in which they are read. Raises `DataError` when one cannot be read."""
    named: list[tuple[str, Path | None]] = []
    for given in inputs:
        root, files = Path(given), files_of(given)
        named += [(file.relative_to(root).as_posix() if root.is_dir() else file.name, file) for file in files] or [
            (dataset_named(given), None)
        ]
    total, done = sum(path.stat().st_size for _, path in named if path is not None), 0
    sources = []
    for name, path in named:
        if path is None:
            sources.append(Source(name=name))
            continue
        digest, lines, nbytes = hashlib.sha256(), 0, 0
        for block in _blocks(path):
            digest.update(block)
            lines += block.count(b"\n")
            nbytes += len(block)
            progress("summing", done + nbytes, total)
        done += nbytes
        by_lines = path.suffix.lower() in _BY_LINES
        sources.append(Source(name=name, path=path, nbytes=nbytes, sha256=digest.hexdigest(), lines=lines if by_lines else None))
    return sources


def watched(examples: Iterable[Example], sources: Sequence[Source]) -> Iterator[tuple[int, Example]]:
    """Each example after the number of lines up to it in all sources, or of examples where lines are not counted."""
    ends = accumulate(source.lines or 0 for source in sources)
    begins = {str(source.path): end - (source.lines or 0) for source, end in zip(sources, ends, strict=True)}
    by_lines = total_lines(sources) is not None
    for number, example in enumerate(examples, 1):
        yield begins[example.place.source] + example.place.line if by_lines else number, example


def total_lines(sources: Sequence[Source]) -> int | None:
    """How many lines there are to read, `None` where that is not known."""
    lines = [source.lines for source in sources]
    return None if None in lines else sum(count for count in lines if count is not None)


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
