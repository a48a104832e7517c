"""Plain text: each line that is not blank is a text of its own, and all of it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from corolla.chat.templates import Turn
from corolla.data.examples import Example
from corolla.data.problems import Problems
from corolla.data.readers.files import lines
from corolla.data.readers.formats import FileFormat


def _read(path: Path, problems: Problems) -> Iterator[Example]:
    for place, line in lines(path, problems):
        yield Example(turns=(Turn("assistant", line),), place=place, raw=True)


# Anything may be text, so it is recognized by the file's name (readers/read.py) and by nothing in it.
FORMAT = FileFormat("text", "plain text, a text on each line", lambda head: False, _read)
