"""The processes of a private swarm on this machine: servers of one model, and what else runs beside them."""

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
from pathlib import Path
from types import FrameType

from corolla.cli.opening import SECRET_VARIABLE
from corolla.cli.serve import Signals, until_told_to_end
from corolla.errors import ServerFault
from corolla.types import Span

_START_TIMEOUT = 300.0  # seconds for one process: a large span is read from a slow disk
_DRAIN_TIMEOUT = 1.0  # seconds for a process to leave as it does when others stay
_STOP_TIMEOUT = 15.0  # seconds for it to leave at once
_POLL = 0.05  # seconds
_COROLLA = (sys.executable, "-c", "from corolla.cli.main import app; app()")


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """A `corolla` command, and below it hivemind's processes: a process group of their own."""

    name: str  # as sentences say it
    process: subprocess.Popen[bytes]
    ready: Path
    log: Path

    @property
    def said(self) -> str:
        """The first thing that it wrote into its ready file: an address."""
        return self.ready.read_text(encoding="utf-8").split()[0]

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def check(self) -> None:
        """Raises `ServerFault` where it has ended."""
        if self.ended:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ServerFault(f"{self.name} did not start: {lines[-1] if lines else 'it said nothing'} ({self.log})")


@dataclass(frozen=True, slots=True, eq=False)
class LocalSwarm:
    """Server processes of one model, their logs in `folder`. The secret keeps this machine's other users out."""

    model: str
    folder: Path
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    children: list[Child] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where others join, once the first server is ready."""
        return self.children[0].said

    def start(self, spans: Sequence[Span], machine: Sequence[str]) -> None:
        """The first server, then the others side by side. Raises `ServerFault`, and `KeyboardInterrupt` for a signal."""
        with until_told_to_end() as signals:  # taken down, not thrown: between a start and its entry in the list none may come
            self._serve(spans[0], ["--new-swarm"], machine)
            self._wait(self.children, signals)
            for span in spans[1:]:
                self._serve(span, ["--peers", self.address], machine)
            self._wait(self.children[1:], signals)

    def add(self, name: str, command: Sequence[str]) -> Child:
        """Another command beside the servers, once it is ready. Raises as `start` does."""
        with until_told_to_end() as signals:
            self._start(name, [*command, "--peers", self.address])
            self._wait(self.children[-1:], signals)
        return self.children[-1]

    def watch(self) -> Child | None:
        """Wait for a signal (None) or for a process that ends by itself."""
        with until_told_to_end() as signals:
            while not signals.told.wait(10 * _POLL):
                for child in self.children:
                    if child.ended:
                        return child
        return None

    def end(self) -> None:
        """No process is left after this. Calling it again is no error."""
        with until_told_to_end():  # nor does a Ctrl-C keep one
            for number, patience in ((signal.SIGTERM, _DRAIN_TIMEOUT), (signal.SIGTERM, _STOP_TIMEOUT)):
                for child in self.children:
                    child.process.send_signal(number)
                deadline = time.monotonic() + patience
                while not all(child.ended for child in self.children) and time.monotonic() < deadline:
                    time.sleep(_POLL)
            for child in self.children:
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)  # also what a process that crashed left behind
                child.process.wait()

    def _serve(self, span: Span, joining: Sequence[str], machine: Sequence[str]) -> None:
        self._start(f"the server of blocks {span}", ["serve", self.model, *joining, "--blocks", str(span), *machine])

    def _start(self, name: str, command: Sequence[str]) -> None:
        number = len(self.children)
        ready, log = self.folder / f"ready-{number}", self.folder / f"{number}-{command[0]}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*_COROLLA, *command, "--ready-file", str(ready)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C in the terminal is for the one who started them
                env={**os.environ, SECRET_VARIABLE: self.secret},  # which other users cannot see, as they can a command line
            )
        self.children.append(Child(name, process, ready, log))

    def _wait(self, children: Sequence[Child], signals: Signals) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        for child in children:
            while not child.ready.exists():
                for each in self.children:
                    each.check()
                if signals.told.is_set():
                    raise KeyboardInterrupt
                if time.monotonic() > deadline:
                    raise ServerFault(f"{child.name} was not ready within {_START_TIMEOUT:g} s ({child.log})")
                time.sleep(_POLL)
            print(f"{child.name} is ready", file=sys.stderr)


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
        gone = [child for child in swarm.children if child.ended]
        swarm.end()
        atexit.unregister(swarm.end)
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in gone:
            print(f"{child.name} ended before it was told to: {child.log}", file=sys.stderr)
        if not failed and not gone:
            shutil.rmtree(swarm.folder)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
