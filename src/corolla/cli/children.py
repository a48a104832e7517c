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
import threading
import time
from collections import deque
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
_TENDED_EVERY = 0.5  # seconds
_MOST_AGAIN = 5  # times that servers are started again within...
_AGAIN_SECONDS = 600.0
_PAUSE = 0.5  # seconds before the second time; each further pause is twice as long
_COROLLA = (sys.executable, "-c", "from corolla.cli.main import app; app()")


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """A `corolla` command, and below it hivemind's processes: a process group of their own."""

    name: str  # as sentences say it
    process: subprocess.Popen[bytes]
    ready: Path
    log: Path
    span: Span | None = None  # of a server

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


@dataclass(slots=True, eq=False)
class LocalSwarm:
    """Server processes of one model, their logs in `folder`. The secret keeps this machine's other users out.

    A server that ends by itself is started again, a few times.
    """

    model: str
    folder: Path
    machine: Sequence[str]  # options of each server
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    children: list[Child] = field(default_factory=list)
    address: str = ""  # where others join, once the first server is ready
    started: int = 0  # processes, so far
    _again: deque[float] = field(default_factory=deque)  # when servers were started again
    _lock: threading.Lock = field(default_factory=threading.Lock)  # none is started while all are ended
    _over: bool = False

    def start(self, spans: Sequence[Span]) -> None:
        """The first server, then the others side by side. Raises `ServerFault`, and `KeyboardInterrupt` for a signal."""
        with until_told_to_end() as signals:  # taken down, not thrown: between a start and its entry in the list none may come
            self.children.append(self._serve(spans[0], ["--new-swarm"]))
            self._wait(self.children, signals)
            self.address = self.children[0].said
            for span in spans[1:]:
                self.children.append(self._serve(span, ["--peers", self.address]))
            self._wait(self.children[1:], signals)

    def add(self, name: str, command: Sequence[str]) -> Child:
        """Another command beside the servers, once it is ready. Raises as `start` does."""
        with until_told_to_end() as signals:
            self.children.append(self._start(name, [*command, "--peers", self.address]))
            self._wait(self.children[-1:], signals)
        return self.children[-1]

    def watch(self) -> Child | None:
        """Wait for a signal (None) or for a process that ended by itself and is not started again."""
        with until_told_to_end() as signals:
            while not signals.told.wait(_TENDED_EVERY):
                if (ended := self.tend()) is not None:
                    return ended
        return None

    @contextmanager
    def tended(self) -> Iterator[None]:
        """The same beside the block: whom it cannot start again it names on standard error."""
        over = threading.Event()

        def work() -> None:
            while not over.wait(_TENDED_EVERY):
                if (ended := self.tend()) is not None:
                    print(f"{ended.name} ended by itself again; its log says why: {ended.log}", file=sys.stderr)
                    return

        thread = threading.Thread(target=work, name="corolla-servers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def tend(self) -> Child | None:
        """Start servers anew that ended by themselves; returns a process that is not started again."""
        with self._lock:
            for index, child in enumerate([] if self._over else self.children):
                if not child.ended:
                    continue
                now = time.monotonic()
                while self._again and self._again[0] < now - _AGAIN_SECONDS:
                    self._again.popleft()
                if child.span is None or len(self._again) >= _MOST_AGAIN:
                    return child
                if self._again and now - self._again[-1] < _PAUSE * 2 ** len(self._again):
                    continue
                self._again.append(now)
                print(f"{child.name} ended by itself and is started again; its log says why: {child.log}", file=sys.stderr)
                self.children[index] = self._serve_again(child)
        return None

    def end(self) -> None:
        """No process is left after this. Calling it again is no error."""
        with self._lock:
            self._over = True
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

    def _serve(self, span: Span, joining: Sequence[str]) -> Child:
        # A key that stays: where the first server is started again, its address is the same.
        options = ["--blocks", str(span), "--identity", str(self.folder / f"{span.start}.key"), *joining, *self.machine]
        return self._start(f"the server of blocks {span}", ["serve", self.model, *options], span)

    def _serve_again(self, child: Child) -> Child:
        assert child.span is not None
        with suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)  # a daemon that it left behind has its port
        others = [each.said for each in self.children if each.span is not None and not each.ended and each.ready.exists()]
        joining = ["--peers", others[0]] if others else ["--new-swarm"]
        if child.span.start == 0:
            joining += ["--port", self.address.partition("/tcp/")[2].partition("/")[0]]
        return self._serve(child.span, joining)

    def _start(self, name: str, command: Sequence[str], span: Span | None = None) -> Child:
        ready, log = self.folder / f"ready-{self.started}", self.folder / f"{self.started}-{command[0]}.log"
        self.started += 1
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*_COROLLA, *command, "--ready-file", str(ready)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C in the terminal is for the one who started them
                env={**os.environ, SECRET_VARIABLE: self.secret},  # which other users cannot see, as they can a command line
            )
        return Child(name, process, ready, log, span)

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
    swarm = LocalSwarm(model, Path(tempfile.mkdtemp(prefix="corolla-")), machine)
    atexit.register(swarm.end)  # for a signal that comes just as the `finally` below begins
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    failed = True
    try:
        print(f"starting {len(spans)} server{'s' if len(spans) > 1 else ''}; their logs: {swarm.folder}", file=sys.stderr)
        swarm.start(spans)
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
        if not failed and not gone and swarm.started == len(swarm.children):
            shutil.rmtree(swarm.folder)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
