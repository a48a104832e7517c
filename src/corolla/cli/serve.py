"""`corolla serve`: offer a span of a model to a swarm."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from corolla.cli import logs, options
from corolla.cli.adapters import named_directories
from corolla.cli.addresses import check_addresses
from corolla.cli.logs import LogLevel
from corolla.cli.opening import secret_bytes
from corolla.cli.progress import showing_progress
from corolla.cli.sizes import parse_size
from corolla.errors import InvalidSetting, ServerFault
from corolla.swarm.hosts import is_loopback
from corolla.types import Span

_LOOK = 0.5  # seconds between two looks at whether the server lives
_TO_END = 15.0  # seconds that a dead server has to leave in order
_HURRIED = 2.0  # seconds that one has which is told twice to end


class WireDtype(Enum):
    """`messages.WireDtype`, for the command line."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    Q8 = "q8"


def serve(
    model: options.Model = "smollm2",
    peers: options.Peers = None,
    new_swarm: Annotated[
        bool, typer.Option("--new-swarm", help="Start a swarm instead of joining one.", rich_help_panel=options.SWARM)
    ] = False,
    secret: options.Secret = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="START:END", help="Which blocks, as in 0:12; what the swarm lacks most by default.")
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="How many blocks, where they are chosen; as many as the memory holds by default.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What blocks and cache may take, as in 8GB; most of what is free by default.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    cache_tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens of all sessions together the cache holds.", rich_help_panel=options.MACHINE)
    ] = 32768,
    device: options.Device = None,
    dtype: options.Dtype = None,
    weights: options.Weights = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processor threads; by default the cores, shared with this machine's other servers.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    drafts: Annotated[
        int,
        typer.Option(
            min=0,
            max=15,
            help="How many tokens the head guesses: they are computed with the one before them, and kept as far as it draws the same.",
            rich_help_panel=options.MACHINE,
        ),
    ] = 3,
    batch_invariant: options.BatchInvariant = False,
    share_prefixes: Annotated[
        bool,
        typer.Option(
            "--share-prefixes",
            help="Compute what prompts of several clients begin with once; how soon an answer comes tells what others asked.",
            rich_help_panel=options.MACHINE,
        ),
    ] = False,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Hold this LoRA adapter, which clients name by NAME (the directory's name by default) or hash; may be repeated.",
        ),
    ] = None,
    allow_adapters: Annotated[
        bool, typer.Option("--allow-adapters", help="Take LoRA adapters from clients that ask for it, up to 512 MB of them.")
    ] = False,
    wire_dtype: Annotated[
        WireDtype | None,
        typer.Option(
            help="What it sends to the next server: float32, bfloat16, float16 or q8; what it computes in by default. "
            "q8 halves the bytes of the 16-bit ones, and answers change slightly.",
            metavar="DTYPE",
            show_choices=False,
            rich_help_panel=options.SWARM,
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="For people who look at the swarm.", rich_help_panel=options.SWARM)] = "",
    host: options.Host = "127.0.0.1",
    port: options.Port = 0,
    announce: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="What others dial instead, such as a router's forwarded port: /ip4/203.0.113.5/tcp/4001; may be repeated.",
            rich_help_panel=options.SWARM,
        ),
    ] = None,
    identity: options.IdentityFile = None,
    ready_file: options.ReadyFile = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Offer a span of a model to a swarm, until Ctrl-C or SIGTERM.

    Once ready it prints the line that another machine runs to join. Told to end, it lets its sessions go on at other servers
    first; a second Ctrl-C ends it at once.

    With adapters: corolla serve smollm2 --new-swarm --adapters poet=tuned/poet --adapters tuned/cook
    """
    if bool(peers) == new_swarm:
        raise InvalidSetting("peers", "name a peer of the swarm with --peers, or start one with --new-swarm")
    span = None if blocks is None else _span(blocks)
    nbytes = None if memory is None else parse_size("memory", memory)
    key = secret_bytes(secret)
    logs.set_up(log_level, swarm=True)
    joined = check_addresses(peers)
    held = named_directories(adapters or [])

    from corolla.engine.engine import EngineConfig
    from corolla.server.serve import serving
    from corolla.server.settings import ServeConfig
    from corolla.swarm.peer import PeerConfig

    peer = PeerConfig(initial_peers=joined, host=host, port=port, announce=announce or (), identity=identity, secret=key)
    config = ServeConfig(
        span=span,
        capacity=capacity,
        memory=nbytes,
        name=name,
        device=device,
        dtype=dtype,
        weights=weights,  # type: ignore[arg-type]
        wire_dtype=None if wire_dtype is None else wire_dtype.value,
        threads=threads,
        adapters=held,
        take_adapters=allow_adapters,
        engine=EngineConfig(cache_tokens=cache_tokens, drafts=drafts, batch_invariant=batch_invariant, share_prefixes=share_prefixes),
    )
    with until_told_to_end() as signals, showing_progress() as progress:

        def report(stage: str, done: int, total: int | None) -> None:
            if signals.told.is_set():
                raise typer.Exit  # here nothing is half done
            progress(stage, done, total)

        with serving(model, peer, config, report) as server:
            if ready_file is not None:
                write_whole(ready_file, "\n".join(server.addresses) + "\n")
            for adapter, digest in server.adapters.items():
                print(f"adapter {adapter} {digest[:12]}", file=sys.stderr)
            print(f"serving blocks {server.span} of {model}; another machine joins with", file=sys.stderr)
            print(join_line(model, server.addresses, secret=key is not None), flush=True)
            while not signals.told.wait(_LOOK):
                if server.failure is not None:
                    _end_after(_TO_END)
                    raise ServerFault(f"this server is dead: {server.failure}; start it again")
            _end_after(_HURRIED, once=signals.again)
            print("draining: its sessions go on at other servers; Ctrl-C again ends it at once", file=sys.stderr)
            server.close(signals.again)
        print("done: it has left the swarm", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Signals:
    """What SIGTERM and Ctrl-C set: the first of them `told`, the next ones `again`."""

    told: threading.Event = field(default_factory=threading.Event)
    again: threading.Event = field(default_factory=threading.Event)
    process: int = field(default_factory=os.getpid)

    def take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # hivemind's, forked from this one: it is told to end by its own parent, and must
            raise SystemExit(128 + number)
        (self.again if self.told.is_set() else self.told).set()


@contextmanager
def until_told_to_end() -> Iterator[Signals]:
    """SIGTERM and Ctrl-C are taken down, in place of what they do otherwise."""
    signals = Signals()
    before = {number: signal.signal(number, signals.take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_after(seconds: float, once: threading.Event | None = None) -> None:
    """So many seconds from now, or from when `once` is set, this process ends whatever hangs, and hivemind's processes with it."""

    def end() -> None:
        if once is not None:
            once.wait()
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=end, name="corolla-end", daemon=True).start()


def join_line(model: str, addresses: list[str], *, secret: bool) -> str:
    """The command that another machine runs to join; it says that there is a secret, not which."""
    return shlex.join(["corolla", "serve", model, "--peers", farthest(addresses)]) + (" --secret ..." if secret else "")


def _span(blocks: str) -> Span:
    start, colon, end = blocks.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal()):
        raise InvalidSetting("blocks", f"{blocks!r} is no range; give START:END, as in 0:12")
    return Span(int(start), int(end))


def farthest(addresses: list[str]) -> str:
    """An address that other machines may reach, where there is one."""
    return next((address for address in addresses if not is_loopback(address)), addresses[0])


def write_whole(path: Path, text: str) -> None:
    """Whoever waits for the file finds all of it."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
