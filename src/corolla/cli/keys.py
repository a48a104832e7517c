"""`corolla keys`: who may use a gateway."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from corolla.cli import options

if TYPE_CHECKING:
    from corolla.gateway.keys import Keys

keys = typer.Typer(
    no_args_is_help=True, help="Keys of a gateway: who may use it. They are kept hashed; a key is shown once, when it is made."
)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what for.")],
    rate: Annotated[float | None, typer.Option(min=1, help="Requests a minute at most; unlimited by default.")] = None,
    database: options.Database = None,
) -> None:
    """Make a key, and print it.

    corolla keys create alice --rate 60
    """
    with _opened(database) as entries:
        typer.echo(entries.create(name, rate))


@keys.command("list")
def list_keys(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    database: options.Database = None,
) -> None:
    """List the keys, revoked ones too."""
    with _opened(database) as entries:
        found = entries.entries()
    if json:
        typer.echo(json_format.dumps([{name: getattr(entry, name) for name in entry.__slots__} for entry in found], indent=2))
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "key", "a minute", "made", "revoked", box=None, pad_edge=False)
    for entry in found:
        rate = "unlimited" if entry.rate is None else f"{entry.rate:g}"
        revoked = "" if entry.revoked is None else _day(entry.revoked)
        table.add_row(*map(Text, (entry.name, f"{entry.hint}...", rate, _day(entry.created), revoked)))
    Console().print(table)


@keys.command()
def revoke(name: Annotated[str, typer.Argument(help="As `corolla keys list` shows it.")], database: options.Database = None) -> None:
    """Let a key be worth nothing any more, within seconds."""
    with _opened(database) as entries:
        entries.revoke(name)


@contextmanager
def _opened(url: str | None) -> Iterator[Keys]:
    from corolla.gateway.database import Database, default_url
    from corolla.gateway.keys import Keys

    database = Database(url or default_url())
    try:
        yield Keys(database)
    finally:
        database.close()


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")
