"""Lines and documents, broken ones too."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from data.readers.writing import PERSONACHAT, examples, records, written

from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.errors import DataError


def test_a_broken_line_is_named_and_the_rest_is_done(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a", "compl\n{"completion": "b"}\n\n{"completion": "\xff"}\n[3]\n{"completion": "c"}\n')
    problems, told = Problems(), []
    problems.tell = told.append
    assert [example.turns[0].content for example in read(path, problems)] == ["b", "c"]
    assert problems.count == 3
    assert told[0].startswith(f"{path}:1: is no JSON (Unterminated string")
    assert told[1:] == [f"{path}:4: is not UTF-8 (byte 16): convert the file", f'{path}:5: needs "completion" as text']


def test_many_problems_are_only_counted(tmp_path: Path) -> None:
    told: list[str] = []
    problems = Problems(tell=told.append, told=2)
    assert not list(read(written(tmp_path / "x.jsonl", "{\n" * 50), problems, format="pairs"))
    assert (problems.count, len(told)) == (50, 3)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_json_lines_by_whatever_name(tmp_path: Path, name: str) -> None:
    path = records(tmp_path / name, {"completion": "a"}, {"completion": "b"})
    assert [example.place.line for example in examples(path)] == [1, 2]


@pytest.mark.parametrize(
    "layout",
    [
        '[{"completion": "a"}, {"completion": "b"}]',
        '[{"completion": "a"},\n{"completion": "b"}]\n',
        '[\n{"completion": "a"},\n{"completion": "b"}\n]\n',
        '[\n  {\n    "completion": "a"\n  },\n  {\n    "completion": "b"\n  }\n]\n',
        '{"train": [\n{"completion": "a"},\n{"completion": "b"}]}\n',
        '{\n  "train": [\n    {\n      "completion": "a"\n    },\n    {"completion": "b"}\n  ]\n}\n',
        '\n{"completion": "a"}\n\n{"completion": "b"}\n',
        '\ufeff{"train": [{"completion": "a"}, {"completion": "b"}]}',
    ],
)
def test_json_however_it_is_laid_out(tmp_path: Path, layout: str) -> None:
    assert [example.turns[0].content for example in examples(written(tmp_path / "x.json", layout))] == ["a", "b"]


def test_a_list_on_a_line_of_jsonl_is_one_record(tmp_path: Path) -> None:
    value = [{"completion": "a"}, {"completion": "b"}]
    assert len(examples(records(tmp_path / "one.jsonl", value))) == 1
    assert len(examples(records(tmp_path / "two.json", value, value))) == 2


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"completion": "a"}\n' * 1000))
    assert len(examples(path)) == 1000
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is no whole gzip file"):
        examples(path)


def test_a_damaged_document(tmp_path: Path) -> None:
    whole = json.dumps({"train": [PERSONACHAT] * 3})
    with pytest.raises(DataError, match="is damaged after record 2"):
        examples(written(tmp_path / "x.json", whole[:-30]))
