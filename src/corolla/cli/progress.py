"""Progress on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from corolla.models.checkpoint import Progress


@contextmanager
def showing_progress() -> Iterator[Progress]:
    """Progress on standard error, for fetching and loading models: bars, or a line a stage where it is no terminal.

    Nothing appears where there is nothing to do.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with _bars(console) if console.is_terminal else _lines(console) as progress:
        yield progress


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Bar(*columns, console=console, transient=True)
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int | None) -> None:
        bar.start()  # not before there is something to show: the hub's client draws bars of its own
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


@contextmanager
def _lines(console: Console) -> Iterator[Progress]:
    """For a log: one line a stage."""
    seen = set()

    def show(stage: str, done: int, total: int | None) -> None:
        if stage not in seen:
            console.print(f"{stage} ...")
            seen.add(stage)

    yield show


class CountingTokens:
    """Progress of many answers on standard error: a bar with tokens a second and the time that is left, or a line a minute where it
    is no terminal. `there` of `total` were done before."""

    _EVERY = 60.0  # seconds

    def __init__(self, what: str, total: int, there: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s, left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=total, completed=there, rate=0.0)
        self._total, self._there = total, there
        self._began = self._told = time.monotonic()

    def __enter__(self) -> CountingTokens:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, done: int, tokens: int) -> None:
        """So many are done by now, and so many tokens were written, those before this run left out."""
        now = time.monotonic()
        rate = tokens / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=self._there + done, rate=rate)
        if self._bar.disable and now - self._told >= self._EVERY:
            self._told = now
            left = (now - self._began) / max(done, 1) * (self._total - self._there - done)
            self._console.print(f"{self._there + done} of {self._total}, {rate:.0f} tokens/s, {left:.0f} s left", highlight=False)
