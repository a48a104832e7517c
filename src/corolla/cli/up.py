"""`corolla up`: a private swarm on this machine, and a conversation with it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli import options
from corolla.cli.chat import chat
from corolla.cli.progress import showing_progress
from corolla.errors import InvalidSetting, ServerFault

_START_TIMEOUT = 300.0  # seconds for one server: a large span is read from a slow disk
_STOP_TIMEOUT = 15.0  # seconds for a server to leave by itself
_COROLLA = (sys.executable, "-c", "from corolla.cli.main import app; app()")


def up(
    model: options.Model = "smollm2",
    servers: Annotated[int, typer.Option(min=1, help="Server processes; each holds an equal share of the blocks.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads of each server.")] = 1,
    dtype: options.Dtype = None,
    weights: options.Weights = None,
    temperature: options.Temperature = 0.7,
    max_new_tokens: options.MaxNewTokens = 512,
) -> None:
    """Start a private swarm on this machine and talk with its model; leaving the conversation ends all of it."""
    from corolla.models import catalog

    with showing_progress() as progress:
        directory = catalog.resolve(model, progress=progress)
    blocks = catalog.describe(model, directory).blocks or 0
    if servers > blocks:
        raise InvalidSetting("servers", f"{servers} servers cannot share {blocks} blocks; give at most one for each")
    machine = ["--threads", str(threads)]
    machine += ["--dtype", dtype] if dtype else []
    machine += ["--weights", weights] if weights else []
    cuts = [blocks * i // servers for i in range(servers + 1)]
    with running_servers(model, list(pairwise(cuts)), machine) as address:
        chat(model, temperature=temperature, max_new_tokens=max_new_tokens, peers=[address])


@contextmanager
def running_servers(model: str, spans: list[tuple[int, int]], machine: list[str]) -> Iterator[str]:
    """Server processes, one a span; gives the first one's address. They are ended with the block, whatever ends it."""
    processes: list[subprocess.Popen[bytes]] = []
    address = ""
    with tempfile.TemporaryDirectory(prefix="corolla-") as folder:
        try:
            for index, (start, end) in enumerate(spans):
                ready = Path(folder) / f"ready-{index}"
                joining = ["--peers", address] if address else ["--new-swarm"]
                command = [*_COROLLA, "serve", model, *joining, "--blocks", f"{start}:{end}", "--ready-file", str(ready), *machine]
                with (Path(folder) / f"log-{index}").open("wb") as log:
                    # A session of its own: a Ctrl-C in the terminal is the conversation's, not the servers'.
                    processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True))
                print(f"starting server {index + 1} of {len(spans)}: blocks {start}:{end}", file=sys.stderr)
                _wait(processes[-1], ready, Path(folder) / f"log-{index}")
                address = address or ready.read_text(encoding="utf-8").split()[0]
            yield address
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(_STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _wait(process: subprocess.Popen[bytes], ready: Path, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ServerFault(f"a server did not start: {lines[-1] if lines else 'it said nothing'}")
        time.sleep(0.05)
