"""A swarm whose processes are forked from one that has imported everything: as real as those of `Swarm`, and started in a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.swarm.harness import DEADLINE, Server, Swarm

# Nothing may have begun a thread before a fork. A child draws its own random numbers, and waits for its own children.
_LAUNCHER = """
import ctypes, json, os, random, signal, sys, threading
import hivemind, torch
import corolla.cli.bootstrap, corolla.cli.serve, corolla.server.serve, corolla.swarm.peer
from corolla.cli.main import app
assert threading.active_count() == 1
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends when the launcher does, whose input ends with the tests
        random.seed()
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT)
        for descriptor, other in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(other, descriptor)
        sys.stdin = open(os.devnull)
        sys.argv[1:] = task["command"]
        app()
    print(child, flush=True)
"""


class ForkedSwarm(Swarm):
    """`Swarm`, for tests that start many servers. All of them have this process's environment."""

    def __init__(self, directory: Path, folder: Path, *options: str) -> None:
        command = [sys.executable, "-c", _LAUNCHER]
        self._launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
        super().__init__(directory, folder, *options)

    def run(self, *command: str, blocks: str = "", options: tuple[str, ...] = (), proxy: Any = None) -> Server:
        """See `Swarm.run`."""
        number = sum(1 for _ in self.folder.glob("log-*"))
        ready, log = self.folder / f"ready-{number}", self.folder / f"log-{number}"
        log.touch()
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.write(json.dumps({"command": [*command, "--ready-file", str(ready)], "log": str(log)}) + "\n")
        self._launcher.stdin.flush()
        process: Any = _Forked(int(self._launcher.stdout.readline()))
        return Server(process, ready, log, blocks, options, proxy)

    def close(self) -> None:
        super().close()
        with self._launcher:  # which closes its pipes
            self._launcher.kill()


class _Forked:
    """What of `subprocess.Popen` the harness uses, for a process that is not this one's child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        return None if self._process.is_running() else 1

    def wait(self) -> None:
        self._process.wait(DEADLINE)
