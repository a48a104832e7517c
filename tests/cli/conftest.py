"""A command line whose models are scripts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy
from fakes import FakeEngine
from typer.testing import CliRunner

from corolla.client.tokenizer import TextTokenizer


@dataclass
class FakeModel:
    """What `open_model` opens: `answers` are given in turn, the last one for ever after; `opened` are its arguments."""

    directory: Path
    answers: list[str] = field(default_factory=lambda: ["fine, thank you!"])
    opened: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.tokenizer = TextTokenizer(self.directory)
        self.engine = FakeEngine(self.script)

    def script(self, history: list[int]) -> Iterator[int]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        yield from self.tokenizer.encode(answer)
        yield toy.END

    @contextmanager
    def open_model(self, model: str, **options: Any) -> Iterator[SimpleNamespace]:
        self.opened.append((model, options))
        if self.error:
            raise self.error
        yield SimpleNamespace(
            transport=self.engine.transport, peer="fake", directory=self.directory, context_length=500, vocabulary=400,
            cache_tokens=4000, sessions=4,
        )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModel]:
    model = FakeModel(toy.make_directory(tmp_path / "model", toy.byte_level()))
    monkeypatch.setitem(sys.modules, "corolla.server.embedded", SimpleNamespace(open_model=model.open_model))  # type: ignore[arg-type]
    yield model
    model.engine.stop()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands set up the logging of their process, which here is that of all tests."""
    loggers = [logging.getLogger(name) for name in (None, "corolla", "hivemind.dht", "hivemind.p2p")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture
def corolla(model: FakeModel) -> Callable[..., Any]:
    """Runs the command line in this process; the result has `stdout`, `stderr` and `exit_code`."""
    from corolla.cli.main import app

    def run(*arguments: str, stdin: str | bytes = "") -> Any:
        return CliRunner().invoke(app, list(arguments), input=stdin)

    return run
