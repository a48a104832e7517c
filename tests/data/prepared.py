"""Inputs and a tokenizer for tests of `corolla prepare`, and what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import toy

from corolla.data.prepare import PrepareSettings, prepare
from corolla.data.problems import Problems
from corolla.models.checkpoint import Progress

SLOW_START = 120  # seconds that a process may take on a busy machine


def pairs(path: Path, count: int, *, words: int = 4) -> Path:
    """A JSONL file of `count` chats, all different, of several lengths."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": f"It is {number}. " * (1 + number % words)},
            ]
            file.write(json.dumps({"messages": messages, "category": f"kind {number % 3}"}) + "\n")
    return path


def tokenizer(directory: Path) -> Path:
    """A toy tokenizer's directory."""
    return toy.make_directory(directory / "model", toy.byte_level(), template=toy.CHATML)


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody looks at."""


def run(
    source: Path, output: Path, model: Path, *, problems: Problems | None = None, progress: Progress = quiet, **options: Any
) -> dict[str, Any]:
    """Prepare `output` in this process."""
    settings = PrepareSettings(inputs=(str(source),), tokenizer=model, **{"max_length": 128, "workers": 1, **options})
    return prepare(settings, output, progress, problems or Problems(tell=lambda message: None))


def command(source: Path, output: Path, model: Path, *options: str) -> list[str]:
    """The command that prepares `output` in a process of its own."""
    start = "from corolla.cli.main import app; app()"
    return [sys.executable, "-c", start, "prepare", str(source), "--output", str(output), "--tokenizer", str(model), *options]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` by its name."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
