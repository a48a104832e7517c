"""Sequences in files: whole, the same bytes for the same sequences, and refused when damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from corolla.data.hdf5 import SequenceFile, write_sequences
from corolla.data.tokens import Tokens
from corolla.errors import DataError

LENGTH = 512


def sequences(count: int, *, categories: bool = False) -> list[Tokens]:
    made = np.random.default_rng(0)
    return [
        Tokens(
            made.integers(0, 50_000, LENGTH, np.int32),
            made.integers(0, 4, LENGTH, np.int32),
            made.integers(-1, 9, LENGTH, np.int32) if categories else None,
        )
        for _ in range(count)
    ]


def columns(found: list[Tokens]) -> list[list[list[int] | None]]:
    return [[None if column is None else column.tolist() for column in sequence.columns] for sequence in found]


@pytest.mark.parametrize("categories", [False, True])
@pytest.mark.parametrize("count", [0, 1, 600])
def test_written_sequences_are_read_back(tmp_path: Path, count: int, categories: bool) -> None:
    made = sequences(count, categories=categories)
    assert write_sequences(tmp_path / "train.hdf5", iter(made), LENGTH) == count
    with SequenceFile(tmp_path / "train.hdf5") as file:
        assert (len(file), file.max_length) == (count, LENGTH)
        assert columns(list(file)) == columns(made)


def test_a_sequence_by_its_index(tmp_path: Path) -> None:
    made = sequences(3)
    write_sequences(tmp_path / "train.hdf5", made, LENGTH)
    with SequenceFile(tmp_path / "train.hdf5") as file:
        assert columns([file[1], file[-1]]) == columns([made[1], made[2]])
        with pytest.raises(IndexError):
            file[3]


def test_the_fields_are_those_of_bloomchats_tools(tmp_path: Path) -> None:
    write_sequences(tmp_path / "train.hdf5", sequences(3, categories=True), LENGTH)
    with h5py.File(tmp_path / "train.hdf5") as file:
        assert set(file) == {"input_ids", "token_type_ids", "category_ids"}
        for field in file.values():
            assert (field.shape, field.dtype, field.compression) == ((3, LENGTH), np.int32, "gzip")


def test_files_of_bloomchats_tools_are_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "theirs.hdf5", "w") as file:
        for name in ("input_ids", "token_type_ids"):
            file.create_dataset(name, data=[[1, 2, 3]] * 5, dtype="i4", compression="gzip", maxshape=(None, 3))
    with SequenceFile(tmp_path / "theirs.hdf5") as file:
        assert [sequence.input_ids.tolist() for sequence in file] == [[1, 2, 3]] * 5


def test_the_same_sequences_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_sequences(tmp_path / name, sequences(600), LENGTH)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_stood_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "train.hdf5"
    write_sequences(path, sequences(3), LENGTH)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="every sequence needs input_ids of 512 tokens"):
        write_sequences(path, [*sequences(3), sequences(1)[0][:5]], LENGTH)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["train.hdf5"]


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from corolla.data.hdf5 import write_sequences
from corolla.data.tokens import Tokens
from corolla.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
made = np.random.default_rng(0)
try:
    write_sequences(Path(sys.argv[1]), (Tokens(*made.integers(0, 4, (2, 2048), np.int32)) for _ in range(2000)), 2048)
except StorageError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX has it")
def test_a_full_disk(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "train.hdf5")], capture_output=True, text=True, timeout=120)
    assert "train.hdf5 cannot be written: " in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "train.hdf5"
    write_sequences(path, sequences(3), LENGTH)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"train.hdf5 is no whole HDF5 file .*truncated"):
        SequenceFile(path)


def test_a_damaged_chunk(tmp_path: Path) -> None:
    path = tmp_path / "train.hdf5"
    write_sequences(path, sequences(3), LENGTH)
    with h5py.File(path) as file:
        at = file["input_ids"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(content)
    with SequenceFile(path) as file, pytest.raises(DataError, match=r"train.hdf5 is damaged at sequence 0"):
        list(file)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"input_ids": np.zeros((2, 3), np.int32)}, "has no token_type_ids of int32 in rows"),
        ({"input_ids": np.zeros((2, 3), np.int64), "token_type_ids": np.zeros((2, 3), np.int32)}, "has no input_ids of int32"),
        ({"input_ids": np.zeros(3, np.int32), "token_type_ids": np.zeros(3, np.int32)}, "has no input_ids of int32 in rows"),
        ({"input_ids": np.zeros((2, 3), np.int32), "token_type_ids": np.zeros((2, 4), np.int32)}, r"token_type_ids of \(2, 4\) beside"),
    ],
)
def test_files_of_something_else(tmp_path: Path, fields: dict[str, np.ndarray], problem: str) -> None:
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for name, content in fields.items():
            file[name] = content
    with pytest.raises(DataError, match=problem):
        SequenceFile(tmp_path / "x.hdf5")


def test_token_types_that_there_are_not(tmp_path: Path) -> None:
    write_sequences(tmp_path / "x.hdf5", [Tokens(np.zeros(4, np.int32), np.full(4, 7, np.int32))], 4)
    with SequenceFile(tmp_path / "x.hdf5") as file, pytest.raises(DataError, match="has token types beyond 0 to 3"):
        file[0]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: prepare the data first"):
        SequenceFile(tmp_path / "x.hdf5")
