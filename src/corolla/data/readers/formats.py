"""The shape of a reader: how its format is recognized, and how its examples are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from corolla.data.examples import Example, Place
from corolla.data.problems import Problems


class Record(NamedTuple):
    """One JSON value: a line of JSONL, an element of a JSON list, a row of a dataset."""

    place: Place
    value: Any


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """A format of JSON records: `matches` tells it by one of them, `read` makes examples of all that follow."""

    name: str
    about: str
    matches: Callable[[Any], bool]
    read: Callable[[Iterable[Record], Problems], Iterator[Example]]


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A format of files: `matches` tells it by a file's first bytes (64 KiB at most), `read` makes examples of the file."""

    name: str
    about: str
    matches: Callable[[bytes], bool]
    read: Callable[[Path, Problems], Iterator[Example]]


def each(examples: Callable[[Place, Any], Iterator[Example]]) -> Callable[[Iterable[Record], Problems], Iterator[Example]]:
    """A `read` for records that stand for themselves. What `examples` refuses with `ValueError` is a problem of that record."""

    def read(records: Iterable[Record], problems: Problems) -> Iterator[Example]:
        for record in records:
            try:
                found = list(examples(record.place, record.value))
            except ValueError as error:
                problems.add(record.place, str(error))
                continue
            yield from found

    return read


def text(value: Any, field: str) -> str:
    """`value[field]`, which has to be text. Raises `ValueError` with a sentence if it is not there or anything else."""
    content = value.get(field) if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise ValueError(f'needs "{field}" as text')
    return content


def has(value: Any, *fields: str) -> bool:
    """Whether `value` is a JSON object with all of `fields`."""
    return isinstance(value, dict) and all(field in value for field in fields)
