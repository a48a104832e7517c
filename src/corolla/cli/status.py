"""`corolla status`: who serves what in a swarm."""

from __future__ import annotations

import json as json_format
import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from corolla.cli import options
from corolla.cli.opening import secret_bytes
from corolla.errors import InvalidSetting

if TYPE_CHECKING:
    from rich.console import Console

    from corolla.swarm.records import ServerRecord

_WIDTH = 30  # columns of the drawing
_WATCH = 3.0  # seconds between two looks


def status(
    peers: options.Peers = None,
    secret: options.Secret = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list of the servers' records.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds, until Ctrl-C.")] = False,
) -> None:
    """Show a swarm's servers: which blocks they hold, how fast they are, and what is missing."""
    if not peers:
        raise InvalidSetting("peers", "name a peer of the swarm with --peers")
    key = secret_bytes(secret)

    from corolla.swarm.peer import PeerConfig, SwarmPeer

    peer = SwarmPeer(PeerConfig(initial_peers=peers, secret=key, client_mode=True))
    try:
        _report(peer.servers(), json=json)
        while watch:
            time.sleep(_WATCH)
            _report(peer.servers(), json=json)
    finally:
        peer.close()


def _report(records: list[ServerRecord], *, json: bool) -> None:
    if json:
        typer.echo(json_format.dumps([msgspec.to_builtins(record) for record in records], indent=2))
        return

    from rich.console import Console

    console = Console()
    if not records:
        console.print("no server is announced in this swarm")
    for model in sorted({record.model for record in records}):
        show(console, model, [record for record in records if record.model == model])


def show(console: Console, model: str, records: list[ServerRecord]) -> None:
    """One model's servers as a table with a drawing of their spans, and the blocks that nobody holds."""
    from rich.table import Table

    from corolla.swarm.routing import gaps

    blocks = records[0].blocks
    table = Table("server", "blocks", f"of {blocks}", "rows/s", "active", "weights", "state", box=None, pad_edge=False)
    table.columns[2].no_wrap = True
    for record in records:
        name = record.name or record.peer[-8:]
        speed = f"{record.throughput / len(record.span):.0f}"
        figures = (speed, str(record.active), f"{record.dtype} {record.weights}", record.state)
        table.add_row(name, str(record.span), drawing(record, blocks), *figures)
    console.print(f"model {model}")
    console.print(table)
    missing = gaps(records, blocks)
    console.print(f"nobody holds blocks {', '.join(map(str, missing))}" if missing else "every block is held")


def drawing(record: ServerRecord, blocks: int) -> str:
    """The span as a bar over the model's blocks."""
    first, last = record.start * _WIDTH // blocks, -(-record.end * _WIDTH // blocks)
    return "\u00b7" * first + "\u2588" * (last - first) + "\u00b7" * (_WIDTH - last)
