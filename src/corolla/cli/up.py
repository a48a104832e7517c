"""`corolla up`: a private swarm on this machine, and the page for it or a conversation with it."""

from __future__ import annotations

import os
import sys
import webbrowser
from itertools import pairwise
from typing import Annotated

import typer

from corolla.cli import options
from corolla.cli.chat import chat
from corolla.cli.children import LocalSwarm, running_servers
from corolla.cli.logs import LogLevel
from corolla.cli.progress import showing_progress
from corolla.errors import InvalidSetting, ServerFault
from corolla.types import Span


def up(
    model: options.Model = "smollm2",
    servers: Annotated[int, typer.Option(min=1, help="Server processes; each holds an equal share of the blocks.")] = 2,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 is any that is free.")] = 8000,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page in a browser.")] = False,
    talk: Annotated[bool, typer.Option("--chat", help="Talk in this terminal; there is no page.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Processor threads of each server; they share the cores by default.", rich_help_panel=options.MACHINE),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    weights: options.Weights = None,
    temperature: options.Temperature = 0.7,
    max_new_tokens: options.MaxNewTokens = 512,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Start a private swarm on this machine and a page to talk with its model; one Ctrl-C ends all of it.

    corolla up smollm2 --servers 3 --port 8080

    The page is for this machine alone, and so is the swarm: others of this machine's users lack its secret. The sampling options are
    those of the conversation in this terminal (--chat); the page has its own.
    """
    from corolla.models import catalog

    with showing_progress() as progress:
        directory = catalog.resolve(model, progress=progress)
    blocks = catalog.describe(model, directory).blocks or 0
    if servers > blocks:
        raise InvalidSetting("servers", f"{servers} servers cannot share {blocks} blocks; give at most one for each")
    machine = ["--log-level", "debug" if log_level is LogLevel.DEBUG else "info"]
    machine += ["--threads", str(threads)] if threads else []
    machine += ["--dtype", dtype] if dtype else []
    machine += ["--device", device] if device else []
    machine += ["--weights", weights] if weights else []
    cuts = [blocks * i // servers for i in range(servers + 1)]
    spans = [Span(start, end) for start, end in pairwise(cuts)]
    with running_servers(model, spans, machine) as swarm:
        if talk:
            with swarm.tended():
                chat(
                    model,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    peers=[swarm.address],
                    secret=swarm.secret,
                    log_level=log_level,
                )
        else:
            _show_page(swarm, port, browser=not no_browser)


def _show_page(swarm: LocalSwarm, port: int, *, browser: bool) -> None:
    """The gateway, until Ctrl-C (which is `KeyboardInterrupt`).

    Raises `ServerFault` when the gateway ends by itself, or servers do again and again.
    """
    # An answer that is cut off by the end is kept, and shown as interrupted.
    gateway = swarm.add("the gateway", ["gateway", swarm.model, "--port", str(port), "--drain", "0", "--log-level", "info"])
    print(f"\n  {gateway.said}\n\nCtrl-C ends the page and the swarm.", file=sys.stderr)
    if browser and _has_display():
        webbrowser.open(gateway.said)
    ended = swarm.watch()
    if ended is None:
        raise KeyboardInterrupt
    raise ServerFault(f"{ended.name} ended by itself; its log says why: {ended.log}")


def _has_display() -> bool:
    """Where there is none, a browser for terminals would take this one."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
