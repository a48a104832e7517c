"""`corolla up`: a private swarm on this machine, and a conversation with it."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from corolla.cli import options
from corolla.cli.chat import chat
from corolla.cli.logs import LogLevel
from corolla.cli.opening import SECRET_VARIABLE
from corolla.cli.progress import showing_progress
from corolla.cli.serve import Signals, until_told_to_end
from corolla.errors import InvalidSetting, ServerFault
from corolla.types import Span

_START_TIMEOUT = 300.0  # seconds for one server: a large span is read from a slow disk
_DRAIN_TIMEOUT = 1.0  # seconds for a server to leave as it does when others stay
_STOP_TIMEOUT = 15.0  # seconds for it to leave at once
_POLL = 0.05  # seconds
_COROLLA = (sys.executable, "-c", "from corolla.cli.main import app; app()")


def up(
    model: options.Model = "smollm2",
    servers: Annotated[int, typer.Option(min=1, help="Server processes; each holds an equal share of the blocks.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads of each server.", rich_help_panel=options.MACHINE)] = 1,
    dtype: options.Dtype = None,
    weights: options.Weights = None,
    temperature: options.Temperature = 0.7,
    max_new_tokens: options.MaxNewTokens = 512,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Start a private swarm on this machine and talk with its model; leaving the conversation ends all of it."""
    from corolla.models import catalog

    with showing_progress() as progress:
        directory = catalog.resolve(model, progress=progress)
    blocks = catalog.describe(model, directory).blocks or 0
    if servers > blocks:
        raise InvalidSetting("servers", f"{servers} servers cannot share {blocks} blocks; give at most one for each")
    machine = ["--threads", str(threads), "--log-level", "debug" if log_level is LogLevel.DEBUG else "info"]
    machine += ["--dtype", dtype] if dtype else []
    machine += ["--weights", weights] if weights else []
    cuts = [blocks * i // servers for i in range(servers + 1)]
    spans = [Span(start, end) for start, end in pairwise(cuts)]
    with running_servers(model, spans, machine) as swarm:
        chat(
            model,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            peers=[swarm.servers[0].address],
            secret=swarm.secret,
            log_level=log_level,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ServerProcess:
    """A `corolla serve` of one span, and below it hivemind's processes: a process group of their own."""

    process: subprocess.Popen[bytes]
    span: Span
    ready: Path
    log: Path

    @property
    def address(self) -> str:
        """Where others join, once it is ready."""
        return self.ready.read_text(encoding="utf-8").split()[0]

    def check(self) -> None:
        """Raises `ServerFault` where it has ended."""
        if self.process.poll() is not None:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ServerFault(f"the server of blocks {self.span} did not start: {lines[-1] if lines else 'it said nothing'} ({self.log})")


@dataclass(frozen=True, slots=True, eq=False)
class LocalSwarm:
    """Server processes of one model, their logs in `folder`. The secret keeps this machine's other users out."""

    model: str
    folder: Path
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    servers: list[ServerProcess] = field(default_factory=list)

    def start(self, spans: Sequence[Span], machine: Sequence[str]) -> None:
        """The first server, then the others side by side. Raises `ServerFault`, and `KeyboardInterrupt` for a signal."""
        with until_told_to_end() as signals:  # taken down, not thrown: between a start and its entry in the list none may come
            self._start(spans[0], ["--new-swarm"], machine)
            self._wait(self.servers, signals)
            for span in spans[1:]:
                self._start(span, ["--peers", self.servers[0].address], machine)
            self._wait(self.servers[1:], signals)

    def end(self) -> None:
        """No process is left after this. Calling it again is no error."""
        with until_told_to_end():  # nor does a Ctrl-C keep one
            for number, patience in ((signal.SIGTERM, _DRAIN_TIMEOUT), (signal.SIGTERM, _STOP_TIMEOUT)):
                for server in self.servers:
                    server.process.send_signal(number)
                deadline = time.monotonic() + patience
                while any(server.process.poll() is None for server in self.servers) and time.monotonic() < deadline:
                    time.sleep(_POLL)
            for server in self.servers:
                with suppress(ProcessLookupError):
                    os.killpg(server.process.pid, signal.SIGKILL)  # also what a server that crashed left behind
                server.process.wait()

    def _start(self, span: Span, joining: Sequence[str], machine: Sequence[str]) -> None:
        ready, log = self.folder / f"ready-{span.start}", self.folder / f"blocks-{span.start}-{span.end}.log"
        command = [*_COROLLA, "serve", self.model, *joining, "--blocks", str(span), "--ready-file", str(ready), *machine]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C in the terminal is the conversation's, not the servers'
                env={**os.environ, SECRET_VARIABLE: self.secret},  # which other users cannot see, as they can a command line
            )
        self.servers.append(ServerProcess(process, span, ready, log))

    def _wait(self, servers: Sequence[ServerProcess], signals: Signals) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        for server in servers:
            while not server.ready.exists():
                for each in self.servers:
                    each.check()
                if signals.told.is_set():
                    raise KeyboardInterrupt
                if time.monotonic() > deadline:
                    raise ServerFault(f"the server of blocks {server.span} was not ready within {_START_TIMEOUT:g} s ({server.log})")
                time.sleep(_POLL)
            print(f"blocks {server.span} are ready", file=sys.stderr)


@contextmanager
def running_servers(model: str, spans: Sequence[Span], machine: Sequence[str]) -> Iterator[LocalSwarm]:
    """Server processes, one a span. They are ended with the block, whatever ends it; their logs stay where one failed."""
    swarm = LocalSwarm(model, Path(tempfile.mkdtemp(prefix="corolla-")))
    atexit.register(swarm.end)  # for a signal that comes just as the `finally` below begins
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    failed = True
    try:
        print(f"starting {len(spans)} server{'s' if len(spans) > 1 else ''}; their logs: {swarm.folder}", file=sys.stderr)
        swarm.start(spans, machine)
        yield swarm
        failed = False
    except (KeyboardInterrupt, SystemExit):
        failed = False
        raise
    finally:
        print("ending the servers", file=sys.stderr)
        gone = [server for server in swarm.servers if server.process.poll() is not None]
        swarm.end()
        atexit.unregister(swarm.end)
        for number, handler in before.items():
            signal.signal(number, handler)
        for server in gone:
            print(f"the server of blocks {server.span} ended before it was told to: {server.log}", file=sys.stderr)
        if not failed and not gone:
            shutil.rmtree(swarm.folder)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
