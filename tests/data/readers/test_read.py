"""Sources of every kind, and formats by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.readers.writing import a, examples, records, written

from corolla.data.problems import Problems
from corolla.data.readers.read import FILE_FORMATS, RECORD_FORMATS, read
from corolla.errors import DataError, InvalidSetting


def test_a_directory_file_by_file(tmp_path: Path) -> None:
    records(tmp_path / "b.jsonl", {"completion": "b"})
    (tmp_path / "a").mkdir()
    written(tmp_path / "a" / "a.txt", "a\n")
    written(tmp_path / "README.md", "# not data\n")
    assert [example.turns[0].content for example in examples(tmp_path)] == ["a", "b"]


def test_an_empty_file_is_a_problem(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", "\n")
    with pytest.raises(DataError, match=r"x.jsonl:1: the file is empty"):
        examples(path)
    assert not list(read(path, Problems(tell=lambda message: None)))


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="there is no 'sharegpt'; there are convai2"):
        read(tmp_path, Problems(), format="sharegpt")
    with pytest.raises(DataError, match=r"nothing.jsonl does not exist"):
        read(tmp_path / "nothing.jsonl", Problems())
    with pytest.raises(DataError, match="has no files that end in"):
        examples(tmp_path)
    with pytest.raises(DataError, match="of no format that is known by its content"):
        examples(written(tmp_path / "x.md", "# A page\n"))
    with pytest.raises(DataError, match=r"x.jsonl:1: is a record of no format"):
        examples(written(tmp_path / "x.jsonl", '{"a": 1}\n'))
    with pytest.raises(DataError, match="has no record of a format that is known"):
        list(read(tmp_path / "x.jsonl", Problems(tell=lambda message: None)))


def test_a_format_that_is_named(tmp_path: Path) -> None:
    path = records(tmp_path / "x.jsonl", {"instruction": "Do.", "response": "Done.", "completion": "raw"})
    assert not examples(path)[0].raw
    assert examples(path, format="pairs")[0].raw
    assert examples(path, format="text")[0].turns[0].content.startswith('{"instruction"')


def test_a_file_is_read_no_further_than_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", '{"completion": "a"}\n{broken\n')
    stream = read(path, Problems(strict=True))
    assert next(stream).turns == (a("a"),)
    with pytest.raises(DataError, match=r"x.jsonl:2"):
        next(stream)


def test_every_format_says_what_it_is() -> None:
    assert not set(RECORD_FORMATS) & set(FILE_FORMATS)
    assert all(format.about for format in (*RECORD_FORMATS.values(), *FILE_FORMATS.values()))
