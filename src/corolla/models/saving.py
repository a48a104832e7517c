"""A file that is there whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from corolla.errors import StorageError

if TYPE_CHECKING:
    import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write beside `path`, which it becomes at the end. After an error neither it nor `path` is changed.

    Raises `StorageError` when the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            if os.name != "nt":  # Windows opens no directories
                _sync(path.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file in its place. What the disk refuses is an `OSError`, as with any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise disk_error(error) from None


def disk_error(error: Exception) -> OSError:
    """What safetensors' own error tells of the disk."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
