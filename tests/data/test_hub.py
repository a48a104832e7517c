"""Datasets of the hub; the library that reads them is not needed for anything else."""

from __future__ import annotations

import importlib.util

import pytest

from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.errors import DataError


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the library is installed")
def test_without_the_library_it_is_said_how_to_get_it() -> None:
    with pytest.raises(DataError, match=r"owner/name is no file here; .* pip install 'corolla\[datasets\]'"):
        list(read("owner/name", Problems()))


def test_rows_of_a_dataset(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    directory = tmp_path_factory.mktemp("hub")
    (directory / "small").mkdir()
    (directory / "small" / "train.jsonl").write_text('{"instruction": "Sing.", "response": "La."}\n')
    monkeypatch.chdir(directory)
    from corolla.data.readers import hub

    (row,) = hub.rows("small", "train")
    assert row.value == {"instruction": "Sing.", "response": "La."}
    assert str(row.place) == "small:1"
