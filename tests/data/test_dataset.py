"""Prepared data as a trainer reads it, whoever wrote it, and refused when it is not what was written."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from data.prepared import pairs, run, tokenizer

from corolla.data.dataset import PackedDataset, item, positions_of
from corolla.data.tokens import Kind, Tokens
from corolla.errors import DataError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    run(pairs(root / "chats.jsonl", 100), root / "out", tokenizer(root), files={"train": 3})
    return root / "out"


def copied(directory: Path, target: Path) -> Path:
    for path in directory.rglob("*"):
        if path.is_file():
            (target / path.relative_to(directory)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(directory)).write_bytes(path.read_bytes())
    return target


def test_sequences_by_their_number_and_in_their_order(directory: Path) -> None:
    with PackedDataset(directory) as dataset:
        ids = [each["input_ids"].tolist() for each in dataset]
        assert ids == [dataset[number]["input_ids"].tolist() for number in range(len(dataset))]
        assert dataset[-1]["input_ids"].tolist() == ids[-1]
        assert (dataset.max_length, dataset.metadata["packing"]) == (128, "greedy")
        assert len(list(dataset.articles())) == 100
        with pytest.raises(IndexError):
            dataset[len(ids)]


def test_what_an_item_has(directory: Path) -> None:
    kinds = [Kind.PROMPT, Kind.COMPLETION, Kind.END, Kind.COMPLETION, Kind.END, Kind.PADDING, Kind.PADDING]
    sequence = Tokens(np.arange(7, dtype=np.int32), np.array(kinds, np.int32))
    assert positions_of(sequence).tolist() == [0, 1, 2, 0, 1, 0, 1]
    found = item(sequence)
    assert found["labels"].tolist() == [-100, 1, 2, -100, 4, -100, -100]
    assert {column.dtype for column in found.values()} == {np.dtype(np.int64)}  # type: ignore[attr-defined]


def test_files_of_bloomchats_tools_are_read(tmp_path: Path) -> None:
    for number in range(1, 11):
        with h5py.File(tmp_path / f"train_{number}_of_10.hdf5", "w") as file:
            for name in ("input_ids", "token_type_ids"):
                file.create_dataset(name, data=[[number, 2, 3]] * (2 if number == 1 else 1), dtype="i4", compression="gzip")
            file["token_type_ids"][:] = [0, 1, 3]
    with PackedDataset(tmp_path, verify=False) as dataset:
        assert [each["input_ids"][0] for each in dataset] == [*range(1, 11), 1]


def test_a_file_that_is_another_than_was_written(tmp_path: Path, directory: Path) -> None:
    path = copied(directory, tmp_path) / "train_2_of_3.hdf5"
    path.write_bytes((tmp_path / "train_1_of_3.hdf5").read_bytes())
    with pytest.raises(DataError, match=r"train_2_of_3.hdf5 is not the file that was written \(its SHA-256 differs\)"):
        PackedDataset(tmp_path)


def test_a_file_cut_short(tmp_path: Path, directory: Path) -> None:
    path = copied(directory, tmp_path) / "train_2_of_3.hdf5"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train_2_of_3.hdf5 is not the file that was written"):
        PackedDataset(tmp_path)
    with pytest.raises(DataError, match=r"train_2_of_3.hdf5 is no whole HDF5 file"):
        PackedDataset(tmp_path, verify=False)


def test_what_is_missing(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(DataError, match="nothing does not exist: prepare the data first"):
        PackedDataset(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no dev part"):
        PackedDataset(directory, "dev")
    (copied(directory, tmp_path) / "train_2_of_3.hdf5").unlink()
    with pytest.raises(DataError, match="has 2 files of train, which are not all of one set"):
        PackedDataset(tmp_path)
