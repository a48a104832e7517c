"""`corolla models`: what is on this machine, and what can be fetched."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from typing import Annotated

import typer

from corolla.cli.progress import showing_progress


def models(
    fetch: Annotated[str | None, typer.Option(metavar="NAME", help="Fetch this model (an alias or a hub id) first.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the models on this machine: family, blocks, size and where they lie."""
    from corolla.models import catalog

    if fetch is not None:
        with showing_progress() as progress:
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
