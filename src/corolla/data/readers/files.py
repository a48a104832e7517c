"""Files of any size, gzipped or not, a line or a record at a time."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from corolla.data.examples import Place
from corolla.data.problems import Problems
from corolla.data.readers.formats import Record
from corolla.errors import DataError
from corolla.models.json_files import parse_json

HEAD = 64 * 1024  # bytes by which a format is recognized


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The content of `path`, unpacked if its name ends in .gz. Raises `DataError` when it cannot be read, now or later on."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def head(path: Path) -> bytes:
    """The first bytes of `path`, without a byte order mark. Raises `DataError` as `opened` does."""
    with opened(path) as file:
        return file.read(HEAD).removeprefix(b"\xef\xbb\xbf")


def lines(path: Path, problems: Problems) -> Iterator[tuple[Place, str]]:
    """The lines of `path` that are not blank, with their places and without their ends. One that is not UTF-8 is a problem."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            place = Place(str(path), number)
            try:
                content = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                problems.add(place, f"is not UTF-8 (byte {error.start}): convert the file")
                continue
            if content.strip():
                yield place, content


def json_lines(path: Path, problems: Problems) -> Iterator[Record]:
    """The records of a JSONL file. A line that is no JSON is a problem."""
    for place, line in lines(path, problems):
        try:
            value = parse_json(line)
        except ValueError as error:
            problems.add(place, f"is no JSON ({error})")
            continue
        yield Record(place, value)


def json_elements(path: Path, prefix: str) -> Iterator[Record]:
    """The elements of a list within one JSON document, which is never held whole.

    `prefix` says which: `item` those of a document that is a list, `train.item` those of the list under "train".
    Raises `DataError` where the document is damaged.
    """
    import ijson  # type: ignore[import-untyped]

    with opened(path) as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        number = 0
        try:
            for number, value in enumerate(ijson.items(file, prefix, use_float=True), 1):
                yield Record(Place(str(path), number), value)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            said = " ".join(str(error).split())
            raise DataError(f"{path} is damaged after record {number} ({said}): fetch it again") from None


def top_level_lists(path: Path) -> list[str]:
    """The names of the lists in a JSON object, by reading it once. Raises `DataError` where the document is damaged."""
    import ijson

    with opened(path) as file:
        try:
            return [prefix for prefix, event, _ in ijson.parse(file) if event == "start_array" and "." not in prefix]
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged ({' '.join(str(error).split())}): fetch it again") from None
