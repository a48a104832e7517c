"""`corolla models`: what is on this machine, and what can be fetched."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from corolla.models.checkpoint import Progress


def models(
    fetch: Annotated[str | None, typer.Option(metavar="NAME", help="Fetch this model (an alias or a hub id) first.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the models on this machine: family, blocks, size and where they lie."""
    from corolla.models import catalog

    if fetch is not None:
        with fetching() as progress:
            catalog.resolve(fetch, progress=progress)
    found = catalog.installed()
    missing = {name: alias for name, alias in catalog.ALIASES.items() if name not in {model.name for model in found}}
    if json:
        here = [asdict(model) | {"directory": str(model.directory), "fetched": True} for model in found]
        there = [
            {"name": name, "description": alias.description, "nbytes": alias.nbytes, "fetched": False} for name, alias in missing.items()
        ]
        typer.echo(json_format.dumps(here + there, indent=2))
        return

    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("model", "family", "blocks", "dtype", "size", "where", box=None, pad_edge=False, header_style="bold")
    table.columns[2].justify = table.columns[4].justify = "right"
    table.columns[5].overflow = "fold"
    for model in found:
        blocks = "?" if model.blocks is None else str(model.blocks)
        table.add_row(model.name, model.family or "?", blocks, model.dtype or "?", decimal(model.nbytes), str(model.directory))
    for name, alias in missing.items():
        table.add_row(name, "", "", "", decimal(alias.nbytes), f"not fetched yet: {alias.description}", style="dim")
    Console().print(table)


@contextmanager
def fetching() -> Iterator[Progress]:
    """Progress on standard error, for whatever `catalog.resolve` has to fetch: bars, or a line a stage where it is no terminal.

    Nothing appears where there is nothing to fetch.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with _bars(console) if console.is_terminal else _lines(console) as progress:
        yield progress


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), console=console, transient=True)
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
