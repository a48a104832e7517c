"""What a training run says of itself: `tuning.json`, whose fields docs/tuning.md lists."""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from corolla.errors import TrainingError
from corolla.models.json_files import read_json
from corolla.models.saving import replacing

RECORD = "tuning.json"
_SECONDS = 2.0  # between two writes, while nothing but the curve goes on
_VERSION = 1
_UNWRITTEN = ("path", "written", "_last_write")

Status = Literal["running", "interrupted", "failed", "done"]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The loss of a held-out token in nats, over so many of them; before the first step, `step` is 0."""

    step: int
    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # a float holds no more

    @property
    def fields(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}


@dataclass(slots=True)
class RunRecord:
    """One run. `update` changes fields by their names and writes them, `point` adds to the curve.

    Of the processes of a run one writes; for the others `written` is False.
    """

    path: Path
    settings: dict[str, Any]
    status: Status = "running"
    error: str | None = None
    started: str = field(default_factory=lambda: _now())
    seconds: float = 0.0
    model: dict[str, Any] = field(default_factory=dict)
    prompt: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=lambda: {"done": 0, "total": 0})
    curve: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    base: dict[str, Any] | None = None
    final: dict[str, Any] | None = None  # the evaluation of what is saved, where that need not be the last one
    samples: list[dict[str, Any]] = field(default_factory=list)
    written: bool = field(default=True, repr=False)
    _last_write: float = field(default=0.0, repr=False)

    def update(self, **fields: Any) -> None:
        """Change fields and write all of them. Raises `StorageError` when the disk refuses."""
        for name, value in fields.items():
            setattr(self, name, value)
        self.write()

    def point(self, **entry: Any) -> None:
        """One more entry of the curve; written if the last write is some seconds ago."""
        self.curve.append(entry)
        self.steps = {**self.steps, "done": entry["step"]}
        self.seconds += entry["seconds"]
        if time.monotonic() - self._last_write > _SECONDS:
            self.write()

    def back_to(self, step: int) -> None:
        """Forget what was done after a step: it will be done again."""
        forgotten = [entry for entry in self.curve if entry["step"] > step]
        self.curve = self.curve[: len(self.curve) - len(forgotten)]
        self.evaluations = [entry for entry in self.evaluations if entry["step"] <= step]
        self.seconds -= sum(entry["seconds"] for entry in forgotten)
        self.steps = {**self.steps, "done": step}

    def write(self) -> None:
        """Raises `StorageError` when the disk refuses."""
        if not self.written:
            return
        content = {name: value for name, value in asdict(self).items() if name not in _UNWRITTEN}
        last = self.final or (self.evaluations[-1] if self.evaluations else None)
        content |= {
            "version": _VERSION,
            "updated": _now(),
            "versions": _versions(),
            "perplexity": last["perplexity"] if last else None,
            "base_perplexity": self.base["perplexity"] if self.base else None,
        }
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        self._last_write = time.monotonic()


def read_record(directory: Path, name: str = RECORD) -> RunRecord | None:
    """The record `name` in `directory`, None where there is none. Raises `TrainingError` when it is damaged, or of another version."""
    path = directory / name
    try:
        content = read_json(path)
        if content["version"] != _VERSION:
            raise TrainingError(f"{path} is of version {content['version']}, and this Corolla reads version {_VERSION}")
        names = [name for name in RunRecord.__dataclass_fields__ if name not in _UNWRITTEN]
        return RunRecord(path, **{name: content[name] for name in names})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is no record of a run ({error!r}): give another directory") from None


def begun_in(output: Path, resume: bool, name: str = RECORD) -> RunRecord | None:
    """The run in the directory `output` to go on with, None where one begins. Raises `TrainingError`."""
    if output.exists() and not output.is_dir():
        raise TrainingError(f"{output} is a file: give --output a directory")
    record = read_record(output, name) if output.is_dir() else None
    if not resume:
        if output.is_dir() and any(output.iterdir()):
            what = "holds a run already: add --resume to go on with it" if record else "is not empty: empty it"
            raise TrainingError(f"{output} {what}, or give another --output")
        return None
    if record is None:
        raise TrainingError(f"{output} holds no run to go on with: leave --resume out, or give the --output of one")
    if record.status == "done":
        raise TrainingError(f"the run in {output} is done: give another --output to begin anew")
    return record


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("corolla", "torch", "transformers")}}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
