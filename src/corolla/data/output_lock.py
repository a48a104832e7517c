"""A directory that one run at a time prepares, and that is whole or says that it is not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from corolla.data.layout import UNFINISHED, is_whole
from corolla.data.saving import SUMS, replacing
from corolla.errors import DataError, StorageError
from corolla.models.json_files import read_json

_DONE, _CHUNKS, _PLAN, _LOCK = "done", "articles", "plan.json", "lock"


class Claim:
    """A run's own directory `work` in the one that it prepares; see `claimed`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.work = output / UNFINISHED

    @property
    def done(self) -> Path:
        """Where the files lie that will be published."""
        return self.work / _DONE

    @property
    def chunks(self) -> Path:
        """Where the chunks of articles lie, with which a run that was ended can go on."""
        return self.work / _CHUNKS

    @property
    def is_complete(self) -> bool:
        """Whether all files are there and only have to be published."""
        return (self.done / SUMS).exists() or (self.output / SUMS).exists()

    def agree(self, plan: Mapping[str, Any]) -> None:
        """Begin with this plan, or go on with the same. Raises `DataError` when another one was begun, `StorageError`."""
        plan = json.loads(json.dumps(plan))
        path = self.work / _PLAN
        if not path.exists():
            if (self.output / SUMS).exists():
                raise DataError(f"{self.output} holds prepared data already: name another directory, or delete it")
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(plan), encoding="utf-8")
            return
        try:
            begun = dict(read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}): delete {self.work} to begin anew") from None
        if changed := sorted(name for name in {*plan, *begun} if plan.get(name) != begun.get(name)):
            raise DataError(
                f"{self.work} was begun with other {', '.join(changed)}: say the same again to go on, or delete it to begin anew"
            )

    def publish(self) -> None:
        """Move what is done to its place, the sums last, and remove the rest. Raises `StorageError`."""
        try:
            if self.done.exists():
                for path in sorted(self.done.iterdir(), key=lambda path: (path.name == SUMS, path.name)):
                    target = self.output / path.name
                    if target.is_dir():
                        shutil.rmtree(target)
                    os.replace(path, target)
            for path in sorted(self.work.iterdir(), key=lambda path: path.name == _PLAN):  # as long as it lies there, the rest may
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()
        except OSError as error:
            raise StorageError(f"{self.output} cannot be finished: {error.strerror or error}") from None


@contextmanager
def claimed(output: Path) -> Iterator[Claim]:
    """Claim `output` for this run; what an earlier one left unfinished there is in the claim's `work`.

    Raises `DataError` when another run has it, or something else lies there; `StorageError` when the disk refuses.
    """
    claim = Claim(output)
    if not claim.work.exists():
        if is_whole(output):
            raise DataError(f"{output} holds prepared data already: name another directory, or delete it")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DataError(f"{output} is not an empty directory: name another one")
    created = not output.exists()
    lock = FileLock(claim.work / _LOCK, timeout=0)
    try:
        claim.work.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DataError(f"{output} is being prepared by another run: wait for it, or name another directory") from None
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror or error}") from None
    try:
        yield claim
    finally:
        lock.release()
        with suppress(OSError):
            if not claim.is_complete and not (claim.chunks.exists() and any(claim.chunks.iterdir())):
                (claim.work / _PLAN).unlink(missing_ok=True)  # nothing to go on with
                shutil.rmtree(claim.chunks, ignore_errors=True)
            if not any(path.name != _LOCK for path in claim.work.iterdir()):
                (claim.work / _LOCK).unlink(missing_ok=True)
                claim.work.rmdir()
                if created and not any(output.iterdir()):
                    output.rmdir()
