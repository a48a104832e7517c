"""SHA-256 sums of files, written and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from corolla.errors import DataError
from corolla.models.saving import replacing as replacing

SUMS = "SHA256SUMS"


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal. Raises `DataError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def write_sums(directory: Path, files: Iterable[Path]) -> None:
    """Write the sums of `files`, which lie below `directory`, into its `SUMS`, for `sha256sum -c` too. Raises `StorageError`."""
    named = sorted((file.relative_to(directory).as_posix(), sha256(file)) for file in files)
    with replacing(directory / SUMS) as path:
        path.write_text("".join(f"{digest}  {name}\n" for name, digest in named), encoding="utf-8")


def check_sums(directory: Path) -> list[Path]:
    """The files that `SUMS` names. Raises `DataError` when it is missing or damaged, or a file is missing or another than it was."""
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{directory} has no {SUMS} that can be read: prepare the data again") from None
    files = []
    for line in lines:
        digest, _, name = line.partition("  ")
        path = directory / name
        if len(digest) != 64 or not name or not path.resolve().is_relative_to(directory.resolve()):
            raise DataError(f"{directory / SUMS} is damaged at {line[:80]!r}: prepare the data again")
        if not path.is_file():
            raise DataError(f"{path} is missing: prepare the data again")
        if sha256(path) != digest:
            raise DataError(f"{path} is not the file that was written (its SHA-256 differs): prepare the data again")
        files.append(path)
    return files
