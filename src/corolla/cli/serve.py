"""`corolla serve`: offer a span of a model to a swarm."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli import logs, options
from corolla.cli.addresses import check_addresses
from corolla.cli.logs import LogLevel
from corolla.cli.opening import secret_bytes
from corolla.cli.progress import showing_progress
from corolla.errors import InvalidSetting
from corolla.types import Span


def serve(
    model: options.Model = "smollm2",
    peers: options.Peers = None,
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Start a swarm instead of joining one.")] = False,
    blocks: Annotated[str | None, typer.Option(metavar="START:END", help="Which blocks; what the swarm lacks most by default.")] = None,
    capacity: Annotated[int | None, typer.Option(help="How many blocks, where they are chosen; all by default.")] = None,
    name: Annotated[str, typer.Option(help="For people who look at the swarm.")] = "",
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free.")] = 0,
    announce: Annotated[
        list[str] | None,
        typer.Option(metavar="MULTIADDR", help="What others dial instead, such as a router's forwarded port; may be repeated."),
    ] = None,
    secret: options.Secret = None,
    identity: Annotated[Path | None, typer.Option(help="A key file that keeps this server's id; made where it is missing.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Gets the addresses, a line each, once the server is ready.")] = None,
    dtype: options.Dtype = None,
    weights: options.Weights = None,
    threads: options.Threads = None,
    batch_invariant: options.BatchInvariant = False,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Offer a span of a model to a swarm, until Ctrl-C or SIGTERM.

    Once ready it prints the line that another machine runs to join.
    """
    if bool(peers) == new_swarm:
        raise InvalidSetting("peers", "name a peer of the swarm with --peers, or start one with --new-swarm")
    span = None if blocks is None else _span(blocks)
    key = secret_bytes(secret)
    logs.set_up(log_level, swarm=True)
    joined = check_addresses(peers)

    from corolla.engine.engine import EngineConfig
    from corolla.server.serve import ServeConfig, serving
    from corolla.swarm.peer import PeerConfig

    peer = PeerConfig(initial_peers=joined, host=host, port=port, announce=announce or (), identity=identity, secret=key)
    config = ServeConfig(
        span=span,
        capacity=capacity,
        name=name,
        dtype=dtype,
        weights=weights,  # type: ignore[arg-type]
        threads=threads,
        engine=EngineConfig(batch_invariant=batch_invariant),
    )
    with until_told_to_end() as told, showing_progress() as progress, serving(model, peer, config, progress) as server:
        if ready_file is not None:
            write_whole(ready_file, "\n".join(server.addresses) + "\n")
        print(f"serving blocks {server.span} of {model}; another machine joins with", file=sys.stderr)
        print(f"corolla serve {model} --peers {farthest(server.addresses)}", flush=True)
        told.wait()


@contextmanager
def until_told_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, in place of what they do otherwise."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _span(blocks: str) -> Span:
    start, colon, end = blocks.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal()):
        raise InvalidSetting("blocks", f"{blocks!r} is no range; give START:END, as in 0:12")
    return Span(int(start), int(end))


def farthest(addresses: list[str]) -> str:
    """An address that other machines may reach, where there is one."""
    return next((address for address in addresses if not address.startswith("/ip4/127.")), addresses[0])


def write_whole(path: Path, text: str) -> None:
    """Whoever waits for the file finds all of it."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
