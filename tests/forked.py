"""Processes of the command line, forked from one that has imported everything: as real as started ones, and there in a moment.

A started `corolla` imports torch and hivemind for seconds. Tests that are about the start itself run `COROLLA`.

    python -m tests.forked DESCRIPTOR

is the launcher. Each test process starts its own when the first test asks for it, and it ends with that process.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("cli", "server", "gateway", "swarm")  # whose modules, with all that they import, the launcher has ready
LONGEST = 1 << 20  # bytes of a task
_PR_SET_PDEATHSIG = 1


class Forked:
    """What tests use of `subprocess.Popen`, for a process that the launcher forked: a group and a session of its own."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status  # the end of a pipe on which the launcher says how the process ended
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired("corolla", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def _ended(self, timeout: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
                self.returncode = int(
                    os.read(self._status, 16) or -signal.SIGKILL
                )  # nothing: the launcher is gone, and so are its children
                os.close(self._status)
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Launcher:
    """The test process's side of the launcher."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.forked", str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        atexit.register(self._close)

    def fork(self, task: dict[str, Any], stdin: int, stdout: int, stderr: int) -> Forked:
        status, theirs = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._socket, [json.dumps(task).encode()], [stdin, stdout, stderr, theirs])
                pid = self._socket.recv(16)
        finally:
            os.close(theirs)
        assert pid, "the launcher of forked processes has ended"
        return Forked(int(pid), status)

    def _close(self) -> None:
        self._socket.close()
        self._process.kill()  # a process that was forked from this one may still hold its end of the socket
        self._process.wait()


_launcher = cache(_Launcher)


def start(
    *command: str, output: IO[bytes], errors: IO[bytes] | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Forked:
    """`corolla *command`, with nothing to read."""
    task = {"command": command, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd())}
    with open(os.devnull, "rb") as nothing:
        return _launcher().fork(task, nothing.fileno(), output.fileno(), (errors or output).fileno())


def run(*command: str, timeout: float, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`corolla *command`, and what it printed. Raises `subprocess.TimeoutExpired`."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = start(*command, output=output, errors=errors, env=env)
        try:
            process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        assert process.returncode is not None
        printed = []
        for file in (output, errors):
            file.seek(0)
            printed.append(file.read().decode())
        return subprocess.CompletedProcess(command, process.returncode, *printed)


def _task(channel: socket.socket) -> dict[str, Any] | None:
    """Forks a child for each task until the tests end. Returns the task in a child, and None in the launcher at the end."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    while True:
        ready = select.select([channel, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            _reap(statuses)
        if channel not in ready:
            continue
        packet, descriptors, _, _ = socket.recv_fds(channel, LONGEST, 4)
        if not packet:
            return None
        *streams, status = descriptors
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            for place, stream in enumerate(streams):
                os.dup2(stream, place)
            channel.send(str(os.getpid()).encode())
            channel.close()
            for descriptor in (*descriptors, *statuses.values(), woken, wake):
                os.close(descriptor)
            task: dict[str, Any] = json.loads(packet)
            return task
        statuses[child] = status
        for stream in streams:
            os.close(stream)


def _reap(statuses: dict[int, int]) -> None:
    while statuses:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        pipe = statuses.pop(child)
        with suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(pipe)


def _main() -> None:
    import numpy

    import corolla
    from corolla.cli.main import app

    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(f"corolla.{package}").__path__, f"corolla.{package}."):
            if ".migrations" not in module.name and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    assert corolla.__file__
    assert threading.active_count() == 1, "a thread was begun before a fork"
    gc.collect()
    gc.freeze()  # or each child copies every page of it as it ends
    task = _task(socket.socket(fileno=int(sys.argv[1])))
    if task is None:
        return
    # The rest is a child's: it draws random numbers of its own.
    random.seed()
    numpy.random.seed()
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["env"])
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.argv[1:] = task["command"]
    app()


if __name__ == "__main__":
    _main()
