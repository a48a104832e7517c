"""Files that are whole or not there, and sums that tell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from corolla.data.saving import SUMS, check_sums, replacing, sha256, write_sums
from corolla.errors import DataError, StorageError


def directory_of(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_text("a")
    (tmp_path / "below" / "b").write_text("b")
    write_sums(tmp_path, [tmp_path / "below" / "b", tmp_path / "a"])
    return tmp_path


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(half: Path) -> None:
        half.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), replacing(tmp_path / "x") as temporary:
        fail(temporary)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="x cannot be written: "), replacing(tmp_path / "file" / "x"):
        pass


def test_sums_that_hold(tmp_path: Path) -> None:
    directory = directory_of(tmp_path)
    assert check_sums(directory) == [directory / "a", directory / "below" / "b"]
    assert sha256(directory / "a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_them(tmp_path: Path) -> None:
    subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=directory_of(tmp_path), check=True, timeout=60)


def test_sums_that_do_not_hold(tmp_path: Path) -> None:
    directory = directory_of(tmp_path)
    (directory / "a").write_text("another")
    with pytest.raises(DataError, match=r"a is not the file that was written"):
        check_sums(directory)
    (directory / "a").unlink()
    with pytest.raises(DataError, match="a is missing"):
        check_sums(directory)


@pytest.mark.parametrize("line", ["nonsense", "0" * 64 + "  ../elsewhere", "0" * 64 + "  "])
def test_sums_that_are_damaged(tmp_path: Path, line: str) -> None:
    (tmp_path / SUMS).write_text(f"{line}\n")
    with pytest.raises(DataError, match="is damaged at"):
        check_sums(tmp_path)


def test_no_sums(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"has no {SUMS}"):
        check_sums(tmp_path)
