"""Progress on the terminal."""

from __future__ import annotations

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
