"""Examples from a file, a directory of files, or a dataset's name, whatever their format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from corolla.data.examples import Example, Place
from corolla.data.problems import Problems
from corolla.data.readers import (
    chat,
    convai2,
    dolly,
    hub,
    oasst,
    oig,
    pairs,
    personachat,
    plain_text,
    self_instruct,
    synthetic_persona,
)
from corolla.data.readers.files import head, json_elements, json_lines, top_level_lists
from corolla.data.readers.formats import FileFormat, Record, RecordFormat
from corolla.errors import DataError, InvalidSetting
from corolla.models.json_files import parse_json

# The first that matches counts: more particular ones stand before more general ones.
RECORD_FORMATS: dict[str, RecordFormat] = {
    format.name: format
    for format in (
        oasst.TREES,
        oasst.MESSAGES,
        personachat.FORMAT,
        chat.FORMAT,
        self_instruct.FORMAT,
        dolly.FORMAT,
        pairs.FORMAT,
        oig.FORMAT,
    )
}
FILE_FORMATS: dict[str, FileFormat] = {format.name: format for format in (convai2.FORMAT, synthetic_persona.FORMAT, plain_text.FORMAT)}

_SUFFIXES = (".txt", ".json", ".jsonl", ".ndjson", ".csv")
_LINES = (".jsonl", ".ndjson")
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read(source: str | Path, problems: Problems, *, format: str | None = None, split: str = "train") -> Iterator[Example]:
    """The examples of `source`, one at a time.

    `source` is a file (.gz too), a directory (its files of known suffixes, in the order of their names), or, where there is no
    such file, a dataset of the hub. `format` is a name of `RECORD_FORMATS` or `FILE_FORMATS`; without one each file's is
    recognized from its content, and text by .txt. `split` is the part of a dataset, or of a JSON document that is divided into
    parts. Single lines that cannot be used are `problems`.

    Raises `InvalidSetting` for a format that there is not, `DataError` for a source that is missing, damaged as a whole or of no
    format that is known.
    """
    if format is not None and format not in RECORD_FORMATS and format not in FILE_FORMATS:
        raise InvalidSetting("format", f"there is no {format!r}; there are {', '.join([*FILE_FORMATS, *RECORD_FORMATS])}")
    path = Path(source)
    if path.is_dir():
        return _directory(path, problems, format, split)
    if path.exists():
        return _file(path, problems, format, split)
    if not _DATASET.fullmatch(str(source)) or str(source).endswith((*_SUFFIXES, ".gz")):
        raise DataError(f"{source} does not exist: name a file, a directory or a dataset of the hub")
    return _records(hub.rows(str(source), split), problems, format, str(source))


def files_of(source: str | Path) -> list[Path]:
    """The files that `read` reads for `source`, in their order; none for a dataset of the hub.

    Raises `DataError` for a directory without any.
    """
    path = Path(source)
    if not path.is_dir():
        return [path] if path.exists() else []
    files = sorted(file for file in path.rglob("*") if file.is_file() and _plain_name(file).endswith(_SUFFIXES))
    if not files:
        raise DataError(f"{path} has no files that end in {', '.join(_SUFFIXES)}")
    return files


def _directory(path: Path, problems: Problems, format: str | None, split: str) -> Iterator[Example]:
    for file in files_of(path):
        yield from _file(file, problems, format, split)


def _file(path: Path, problems: Problems, format: str | None, split: str) -> Iterator[Example]:
    start = head(path)
    if not start.strip():
        problems.add(Place(str(path), 1), "the file is empty")
        return
    if format is None:
        format = next((name for name, known in FILE_FORMATS.items() if known.matches(start)), None)
        if format is None and start.lstrip()[:1] not in (b"{", b"[") and _plain_name(path).endswith(".txt"):
            format = plain_text.FORMAT.name
    if format in FILE_FORMATS:
        yield from FILE_FORMATS[format].read(path, problems)
        return
    named = format is not None or _plain_name(path).endswith(_LINES)
    if not named and start.lstrip()[:1] not in (b"{", b"["):
        raise DataError(f"{path} is of no format that is known by its content: name one with --format")
    records = _document(path, start, split) if _is_document(path, start) else json_lines(path, problems)
    yield from _records(records, problems, format, str(path))


def _is_document(path: Path, start: bytes) -> bool:
    """Whether the file is one JSON document rather than one on each line."""
    if _plain_name(path).endswith(_LINES) or start.lstrip()[:1] not in (b"{", b"["):
        return False
    line, _, rest = start.lstrip().partition(b"\n")
    if re.match(rb'\s*[{\[]\s*["{\[]', rest):  # another record, or the next element of a list that is spread over lines
        return line.rstrip().endswith((b"[", b","))
    try:
        value = parse_json(line)
    except ValueError:
        return True  # spread over lines, or longer than `start`
    return isinstance(value, list) or not any(known.matches(value) for known in RECORD_FORMATS.values())


def _document(path: Path, start: bytes, split: str) -> Iterator[Record]:
    if start.lstrip().startswith(b"["):
        return json_elements(path, "item")
    records = json_elements(path, f"{split}.item")
    first = next(records, None)
    if first is None:
        parts = top_level_lists(path)
        known = f"has the parts {', '.join(parts)}, but nothing in {split!r}" if parts else "is one JSON object without lists"
        raise DataError(f"{path} {known}: name its part with --split")
    return chain([first], records)


def _records(records: Iterable[Record], problems: Problems, format: str | None, source: str) -> Iterator[Example]:
    records = iter(records)
    if format is not None:
        yield from RECORD_FORMATS[format].read(records, problems)
        return
    for record in records:
        known = next((known for known in RECORD_FORMATS.values() if known.matches(record.value)), None)
        if known is not None:
            yield from known.read(chain([record], records), problems)
            return
        problems.add(record.place, "is a record of no format that is known: name its format, or see docs/data.md for its fields")
    raise DataError(f"{source} has no record of a format that is known: name one with --format")


def _plain_name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")
