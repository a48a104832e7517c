"""The directory of a batch's results: a job that was killed goes on where it was.

Each result goes into a journal as soon as it is there, in whatever order; when all are there `results.jsonl` gets them in the
order of the requests. `job.json` says what the job is, so that another one is not mixed into it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from corolla.errors import Conflict, StorageError
from corolla.models.saving import replacing

RESULTS = "results.jsonl"
JOURNAL = "journal.jsonl"
JOB = "job.json"
_SYNC_EVERY = 1.0  # seconds: what a machine that loses its power may lose


class BatchOutput:
    """The results of `job` in `directory`, to be written from one thread at a time.

    A result that carries `retry` failed for want of servers: another run of the job asks for it again.

    Raises `Conflict` when the directory holds another job's results, or another process writes to it, and `StorageError`.
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        self.directory = directory
        self._places: dict[int, tuple[int, int]] = {}  # offset and length in the journal
        self._retry: set[int] = set()
        self._synced = time.monotonic()
        self._lock = FileLock(directory / ".lock")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise Conflict(f"{directory}: another process writes results there; wait for it, or give another --output") from None
        except OSError as error:
            raise StorageError(f"{directory} cannot be written: {error.strerror or error}") from None
        try:
            self._check_job(job)
            self.complete = (directory / RESULTS).exists() and not (directory / JOURNAL).exists()
            self._journal = self._open_journal()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._journal is not None:
            self._journal.close()
        self._lock.release()

    def done(self, index: int) -> bool:
        """Whether the request's result is there, and nothing is to be tried again."""
        return self.complete or (index in self._places and index not in self._retry)

    @property
    def to_retry(self) -> int:
        """How many results are errors that another run may mend."""
        return len(self._retry)

    def write(self, index: int, result: Mapping[str, Any]) -> None:
        """Keep a request's result. Raises `StorageError` when the disk refuses."""
        assert self._journal is not None, "a complete job has no more results"
        line = json.dumps({"index": index, "result": result}, ensure_ascii=False).encode() + b"\n"
        try:
            offset = self._journal.tell()
            self._journal.write(line)
            self._journal.flush()
            if time.monotonic() - self._synced >= _SYNC_EVERY:
                os.fsync(self._journal.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise StorageError(
                f"{self.directory / JOURNAL} cannot be written ({error.strerror or error}): make room and run the same command again"
            ) from None
        self._enter(index, offset, len(line), result)

    def finish(self) -> Path:
        """Write the results in the order of the requests; the journal goes unless some are to be tried again.

        Raises `StorageError`; the journal then stays.
        """
        results = self.directory / RESULTS
        if self._journal is None:
            return results
        with replacing(results) as temporary, temporary.open("wb") as file, (self.directory / JOURNAL).open("rb") as journal:
            for index in sorted(self._places):
                offset, length = self._places[index]
                journal.seek(offset)
                result = json.loads(journal.read(length))["result"]
                result.pop("retry", None)
                file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._journal.close()
        self._journal = None
        if not self._retry:
            (self.directory / JOURNAL).unlink()
        return results

    def _enter(self, index: int, offset: int, length: int, result: Mapping[str, Any]) -> None:
        self._places[index] = offset, length
        self._retry.discard(index)
        if result.get("retry"):
            self._retry.add(index)

    def _check_job(self, job: Mapping[str, Any]) -> None:
        path = self.directory / JOB
        wanted = json.loads(json.dumps(job))
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            if (self.directory / RESULTS).exists() or (self.directory / JOURNAL).exists():
                raise Conflict(f"{self.directory} holds results and no {JOB} that says of what: give another --output") from None
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(wanted, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            return
        except ValueError:
            raise Conflict(f"{path} is damaged: give another --output, or remove the directory") from None
        differ = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
        if differ:
            raise Conflict(f"{self.directory} holds another job's results ({', '.join(differ)} differ): give another --output")

    def _open_journal(self) -> BinaryIO | None:
        """The journal, at its end; what a kill left of a line is cut off."""
        if self.complete:
            return None
        path = self.directory / JOURNAL
        try:
            journal = path.open("a+b")
            journal.seek(0)
            offset = 0
            for line in journal:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if not isinstance(entry, dict):
                    break
                self._enter(entry["index"], offset, len(line), entry["result"])
                offset += len(line)
            journal.truncate(offset)
            journal.seek(offset)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None
        return journal
