"""`corolla status`: who serves what in a swarm."""

from __future__ import annotations

import json as json_format
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec
import typer

from corolla.cli import logs, options
from corolla.cli.addresses import check_addresses
from corolla.cli.logs import LogLevel
from corolla.cli.opening import secret_bytes
from corolla.cli.sizes import short
from corolla.errors import CorollaError, InvalidSetting

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from corolla.swarm.network import Network
    from corolla.swarm.probing import Probes, Verdict
    from corolla.swarm.records import ServerRecord

    class Peer(Protocol):
        @property
        def network(self) -> Network: ...

        def servers(self, model: str | None = None) -> list[ServerRecord]: ...


WIDTH = 100  # columns that a table may take
_DRAWING = 12  # columns of the drawing, and where the terminal is narrower than `WIDTH`
_SMALL_DRAWING = 8
_NAME = 12
_WATCH = 3.0  # seconds between two looks
_AGAIN = 15.0  # seconds until a server that computed is asked again
_MOST = 512  # servers that are asked in one look
_COUNTERS_TIMEOUT = 5.0  # seconds for a server to say its counters
_PROBE_TIMEOUT = 4.0  # seconds for one to compute a row
_POLL = 0.02  # seconds
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of a swarm: its servers' records, what came of a probe of each (by peer; empty where none was sent), and the counters
    of those that were asked and answered."""

    records: Sequence[ServerRecord]
    seen: Mapping[str, Verdict] = field(default_factory=dict)
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    problem: str = ""  # why there is nothing newer

    def as_builtins(self) -> list[dict[str, object]]:
        """A JSON object for each server."""
        return [
            msgspec.to_builtins(record)
            | ({"seen": self.seen[record.peer]} if record.peer in self.seen else {})
            | ({"counters": dict(self.counters[record.peer])} if record.peer in self.counters else {})
            for record in self.records
        ]

    def state(self, record: ServerRecord) -> str:
        """What the server says, or what was seen of it where that is less."""
        seen = self.seen.get(record.peer, "proven")
        if seen == "proven" or (seen == "alive" and record.state == "joining"):
            return record.state
        return seen if seen in ("silent", "failing") else "unproven"

    @property
    def believed(self) -> list[ServerRecord]:
        """The records of the servers that are what they say."""
        return [record for record in self.records if self.state(record) == record.state]


def status(
    peers: options.Peers = None,
    secret: options.Secret = None,
    counters: Annotated[
        bool, typer.Option("--counters", help="Ask each server what happened there: steps, pushes, replays, evictions, bans.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list of all that the servers announce, sizes and times unrounded.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds, until Ctrl-C; with --json a list a line.")] = False,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Show a swarm's servers: which blocks they hold, how fast they are, and what is missing.

    tok/s is how many tokens a second a server takes through its blocks, one by one; busy its sessions with work under way; free
    the tokens that its cache still has room for; rtt the median round trip to the servers around it. Each server is asked to compute a
    row: the state is what it says, unless it is silent, failing, or unproven (it answers, and computed nothing in time).
    """
    if not peers:
        raise InvalidSetting("peers", "name a peer of the swarm with --peers")
    key = secret_bytes(secret)
    logs.set_up(log_level, swarm=True)
    joined = check_addresses(peers)

    from corolla.swarm.peer import PeerConfig, SwarmPeer

    peer = SwarmPeer(PeerConfig(initial_peers=joined, secret=key, client_mode=True))
    try:
        probes = probes_over(peer.network)
        first = look(peer, probes, counters=counters)
        if watch:
            _watch(peer, probes, first, counters=counters, json=json)
        elif json:
            typer.echo(json_format.dumps(first.as_builtins(), indent=2))
        else:
            _print(first)
    finally:
        peer.close()


def probes_over(network: Network) -> Probes:
    """Probes of every server at once."""
    from corolla.swarm.probing import ProbeConfig, Probes

    return Probes(network.send, ProbeConfig(newcomers=_MOST, renewals=_MOST, again=_AGAIN, retry=_WATCH, patience=_PROBE_TIMEOUT))


def look(peer: Peer, probes: Probes, *, counters: bool) -> Look:
    """What the swarm is now. Raises `NetworkError`."""
    records = peer.servers()
    peer.network.listen(probes.receive, probes.forget)
    probes.ask(records)
    while probes.waiting:
        time.sleep(_POLL)
    seen = {record.peer: probes.verdict(record) for record in records}
    if not counters:
        return Look(records, seen)

    from corolla.client.counters import ask_counters

    return Look(records, seen, ask_counters(peer.network, [record.peer for record in records], _COUNTERS_TIMEOUT))


def draw(seen: Look, width: int = WIDTH) -> Group:
    """Every model's servers as a table with a drawing of their spans, and the blocks that nobody holds."""
    from rich.console import Group
    from rich.text import Text

    from corolla.swarm.routing import gaps

    def of_model(record: ServerRecord) -> tuple[str, int]:
        return record.model, record.blocks

    parts: list[Text | Table] = []
    for (model, blocks), group in groupby(sorted(seen.records, key=of_model), key=of_model):
        records = list(group)
        missing = gaps([record for record in seen.believed if of_model(record) == (model, blocks)], blocks)
        parts += [
            Text(f"model {model[:16]}, {blocks} blocks, {len(records)} server{'s' if len(records) != 1 else ''}"),
            table(records, seen, width),
        ]
        if missing:
            who = "nobody holds" if gaps(records, blocks) else "no server that answers holds"
            parts.append(Text(f"{who} blocks {', '.join(map(str, missing))}: no answer can be computed", style="bold red"))
        else:
            parts.append(Text("every block is held", style="green"))
        parts += [Text(line) for line in adapter_lines(records, blocks)]
    if not seen.records:
        parts.append(Text("no server is announced in this swarm, or none that this secret can read: corolla doctor --peers tells which"))
    for record in seen.records:
        if record.peer in seen.counters:
            counts = "  ".join(f"{name} {count}" for name, count in sorted(seen.counters[record.peer].items()))
            parts.append(Text.assemble((_name(record), "bold"), f"  {counts or 'has no counters'}"))
    if seen.problem:
        parts.append(Text(seen.problem, style="yellow"))
    return Group(*parts)


def adapter_lines(records: Sequence[ServerRecord], blocks: int) -> list[str]:
    """One model's adapters: by which names servers hold them, and for which blocks nobody does."""
    from corolla.swarm.routing import gaps

    lines = []
    for name, digest in sorted({named for record in records for named in record.adapters.items()}):
        holders = [record for record in records if digest in record.adapters.values()]
        missing = ", ".join(map(str, gaps(holders, blocks)))
        where = f"nobody has it for blocks {missing}" if missing else "every block has it"
        lines.append(f"adapter {name} {digest[:12]}: {len(holders)} server{'s' if len(holders) != 1 else ''}, {where}")
    if takers := sum(record.takes_adapters for record in records):
        lines.append(f"adapters of clients are taken by {takers} server{'s' if takers != 1 else ''}")
    return lines


def table(records: Sequence[ServerRecord], seen: Look, width: int) -> Table:
    """One model's servers, in order, a line each of at most `WIDTH` columns; where `width` is less, about 80."""
    from rich.table import Table
    from rich.text import Text

    blocks = records[0].blocks
    narrow = width < WIDTH
    table = Table("server", "blocks", f"of {blocks}", "tok/s", "busy", "free", "rtt ms", "weights", box=None, pad_edge=False)
    for heading in ("state",) if narrow else ("version", "state"):
        table.add_column(heading)
    for place, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "right" if 3 <= place <= 6 else "left"
    for record in records:
        around = list(record.round_trips.values())
        line = [
            _name(record),
            str(record.span),
            drawing(record, blocks, _SMALL_DRAWING if narrow else _DRAWING),
            short(record.throughput / len(record.span)),
            short(record.active),
            short(record.free_tokens),
            short(statistics.median(around) * 1000) if around else "?",
            f"{_SHORT.get(record.dtype, record.dtype)} {record.weights}"[:11],
            *([] if narrow else [record.version[:8]]),
        ]
        # As texts: what servers call themselves is no markup.
        state = seen.state(record)
        table.add_row(*map(Text, line), Text(state, style={"ready": "", "silent": "red", "failing": "red"}.get(state, "yellow")))
    return table


def drawing(record: ServerRecord, blocks: int, columns: int) -> str:
    """The span as a bar over the model's blocks."""
    first, last = record.start * columns // blocks, -(-record.end * columns // blocks)
    return "\u00b7" * first + "\u2588" * (last - first) + "\u00b7" * (columns - last)


def _name(record: ServerRecord) -> str:
    name = record.name or record.peer[-8:]
    return name if len(name) <= _NAME else name[: _NAME - 1] + "\u2026"


def _print(seen: Look) -> None:
    from rich.console import Console

    # A pipe or a file has no width: whoever reads it wants whole lines.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(draw(seen, console.width))


def _watch(peer: Peer, probes: Probes, seen: Look, *, counters: bool, json: bool) -> None:
    """In place on a terminal, else one look after the other."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if json or not console.is_terminal:
        while True:
            if json:
                typer.echo(json_format.dumps(seen.as_builtins()))
            else:
                _print(seen)
            time.sleep(_WATCH)
            seen = _again(peer, probes, seen, counters=counters)
    with Live(draw(seen, console.width), console=console, auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(_WATCH)
            seen = _again(peer, probes, seen, counters=counters)
            live.update(draw(seen, console.width), refresh=True)


def _again(peer: Peer, probes: Probes, before: Look, *, counters: bool) -> Look:
    try:
        return look(peer, probes, counters=counters)
    except CorollaError as error:
        return Look(before.records, before.seen, before.counters, f"as of a while ago: {error}")
