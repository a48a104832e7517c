"""Datasets of the hub; the library that reads them is not needed for anything else."""

from __future__ import annotations

import sys

import pytest

from corolla.data.problems import Problems
from corolla.data.readers.hub import NAMES
from corolla.data.readers.read import read
from corolla.data.sources import sources_of
from corolla.errors import DataError


@pytest.mark.parametrize(("name", "dataset"), [("owner/name", "owner/name"), *NAMES.items()])
def test_without_the_library_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch, name: str, dataset: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(DataError, match=rf"{dataset} is no file here; .* pip install 'corolla\[data\]'"):
        list(read(name, Problems()))


def test_what_is_written_down_is_the_datasets_own_name() -> None:
    (source,) = sources_of(["oasst1"], lambda stage, done, total: None)
    assert (source.name, source.path) == ("OpenAssistant/oasst1", None)


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
