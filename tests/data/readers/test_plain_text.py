"""Plain text."""

from __future__ import annotations

from pathlib import Path

from data.readers.writing import a, examples, written


def test_plain_text(tmp_path: Path) -> None:
    first, second = examples(written(tmp_path / "book.txt", "\ufeffOnce upon\n\n a time.\r\n"))
    assert (first.turns, first.raw, first.place.line) == ((a("Once upon"),), True, 1)
    assert (second.turns, second.place.line) == ((a(" a time."),), 3)
