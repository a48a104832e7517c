"""Swarms of real processes for swarm.py, Corolla's and Petals': servers, and clients behind a pipe. All end with their `Processes`."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners import Answer

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # the proxy is the tests'

from tests.swarm.chaos import ChaosProxy, Weather  # noqa: E402

COROLLA = (sys.executable, "-c", "from corolla.cli.main import app; app()")
_START_TIMEOUT = 180.0  # seconds for one process
_ANSWER_TIMEOUT = 120.0  # seconds for one request
_BEHIND = 5.0  # seconds, or as long as the first one took: a session of Petals that needs this much longer hangs
_TRIES = 5
_STOP_TIMEOUT = 15.0  # seconds for all of them together to leave by themselves
_PETALS_ADDRESS = re.compile(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+")


class Processes:
    """Child processes, each in a process group of its own with whatever it starts; none outlives `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[subprocess.Popen[str]] = []
        self._others = ExitStack()
        self._logs: dict[int, Path] = {}
        self._count = 0

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def new_path(self, name: str) -> Path:
        """A path in the folder that nobody else has."""
        self._count += 1
        return self.folder / f"{self._count}-{name}"

    def start(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: int | None = None) -> subprocess.Popen[str]:
        """What it writes goes to a log, its standard output too unless `stdout` says otherwise."""
        log = self.new_path("log")
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file if stdout is None else stdout,
                stderr=file,
                text=True,
                env={**os.environ, **(env or {})},
                start_new_session=True,  # a Ctrl-C is the benchmark's, which ends them in its own time
            )
        self._running.append(process)
        self._logs[process.pid] = log
        return process

    def log(self, process: subprocess.Popen[str]) -> str:
        return self._logs[process.pid].read_text(encoding="utf-8", errors="replace")

    def kill(self, process: subprocess.Popen[str]) -> None:
        """As a power cut would: the process and its daemons, at once."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._running.remove(process)

    def close(self) -> None:
        """Give all of them a little time to leave, then end what is left. Closing twice is no error."""
        try:
            for process in self._running:
                process.terminate()
            deadline = time.monotonic() + _STOP_TIMEOUT
            for process in self._running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # after an impatient second Ctrl-C too
            for process in self._running[:]:
                self.kill(process)
            self._others.close()

    def at_close(self, close: Callable[[], object]) -> None:
        """Something else that ends with the processes, after them."""
        self._others.callback(close)

    def fail(self, process: subprocess.Popen[str], what: str) -> SystemExit:
        """What to raise: the end of the process's log says why."""
        return SystemExit("\n".join([f"{what}; its log ends with", *self.log(process).strip().splitlines()[-8:]]))


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that is up; `address` ends with its peer's id."""

    process: subprocess.Popen[str]
    address: str

    @property
    def peer(self) -> str:
        return self.address.rsplit("/", 1)[1]


def even_spans(blocks: int, servers: int) -> list[tuple[int, int]]:
    return [(blocks * i // servers, blocks * (i + 1) // servers) for i in range(servers)]


class CorollaSwarm:
    """`corolla serve` processes of one model, one a span, joined through the first.

    The head guesses `drafts` tokens; `more` are further options of all servers. With `proxied` every server is dialled through a proxy of
    `proxies`: two peers talk through whichever of theirs was dialled.
    """

    def __init__(
        self,
        processes: Processes,
        directory: Path,
        spans: Sequence[tuple[int, int]],
        *,
        threads: int,
        dtype: str | None = None,
        drafts: int = 0,
        proxied: bool = False,
        more: Sequence[str] = (),
    ) -> None:
        self.processes, self.directory = processes, directory
        self._machine = ["--threads", str(threads), "--drafts", str(drafts), *(["--dtype", dtype] if dtype else []), *more]
        self._proxied = proxied
        self.proxies: list[ChaosProxy] = []
        self.servers: dict[str, Server] = {}  # by peer
        self.address = ""
        self.address = self.add(spans[:1])[0].address
        self.add(spans[1:])

    def add(self, spans: Sequence[tuple[int, int]]) -> list[Server]:
        """More servers, started side by side; returns when all are ready."""
        joining = ["--peers", self.address] if self.address else ["--new-swarm"]
        starting = []
        for start, end in spans:
            ready = self.processes.new_path("ready")
            blocks = ["--blocks", f"{start}:{end}", "--ready-file", str(ready)]
            command = [*COROLLA, "serve", str(self.directory), *joining, *blocks, *self._machine, *self._place()]
            starting.append((self.processes.start(command), ready))
        servers = []
        for process, ready in starting:
            deadline = time.monotonic() + _START_TIMEOUT
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise self.processes.fail(process, "a Corolla server did not start")
                time.sleep(0.05)
            servers.append(Server(process, ready.read_text(encoding="utf-8").split()[0]))
        self.servers |= {server.peer: server for server in servers}
        return servers

    def _place(self) -> list[str]:
        if not self._proxied:
            return []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        proxy = ChaosProxy(port)
        proxy.start()
        self.processes.at_close(proxy.close)
        self.proxies.append(proxy)
        return ["--port", str(port), "--announce", proxy.address]

    def set_delay(self, seconds: float) -> None:
        """Of every chunk on its way from one machine to another, one way."""
        for proxy in self.proxies:
            proxy.weather = Weather(delay=seconds)

    @property
    def chunks_held(self) -> tuple[int, float]:
        """How many chunks the proxies have passed on since they were made, and for how many seconds they held them, all together."""
        counters = [proxy.counters for proxy in self.proxies]
        return sum(each.chunks for each in counters), sum(each.held for each in counters)

    @property
    def bytes_carried(self) -> int:
        """Through all proxies, in both directions, since they were made."""
        return sum(proxy.counters.bytes_in + proxy.counters.bytes_out for proxy in self.proxies)

    def kill(self, peer: str) -> None:
        self.processes.kill(self.servers.pop(peer).process)

    def client(self) -> Client:
        command = [sys.executable, str(HERE / "swarm_client.py"), str(self.directory), self.address]
        return Client(self.processes, command)


class PetalsSwarm:
    """Petals servers of one model through petals_peer.py, one a span, joined through the first."""

    PREFIX = "bench"

    def __init__(self, processes: Processes, python: Path, directory: Path, spans: Sequence[tuple[int, int]], *, threads: int) -> None:
        self.processes, self.directory = processes, directory
        self._peer = [str(python), str(HERE / "petals_peer.py")]
        self._threads = threads
        self._clients: list[Client] = []
        self.hung = 0
        self.address = ""
        for start, end in spans:
            self._add(start, end)
        self._client_command = [*self._peer, "client", "1", str(directory), self.address, self.PREFIX]

    @staticmethod
    def version(python: Path) -> str:
        """Raises `SystemExit` when that interpreter cannot import Petals."""
        command = [str(python), str(HERE / "petals_peer.py"), "--version"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{python} cannot import petals (make_petals_peer.sh makes one that can):\n{done.stderr.strip()}")
        return done.stdout.strip()

    def answers(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """All prompts at once, a client process each; with sessions as threads of one process Petals is a tenth slower.

        Should a session hang for good, its client is replaced and all prompts are asked again; `hung` counts that.
        """
        for _ in range(_TRIES):
            while len(self._clients) < len(prompts):
                self._clients.append(Client(self.processes, self._client_command))
            clients = self._clients[: len(prompts)]
            for client in clients:
                client.wait_ready()
            for client, prompt in zip(clients, prompts, strict=True):
                client.send(prompts=[list(prompt)], new_tokens=new_tokens)
            hanging = self._hanging(clients)
            answered = [client.read_answers()[0] for client in clients if client not in hanging]
            if not hanging:
                return answered
            self.hung += 1
            for client in hanging:
                self._clients.remove(client)
                self.processes.kill(client.process)
        raise SystemExit(f"Petals' sessions hung {_TRIES} times in a row: its servers answer no more")

    def _hanging(self, clients: Sequence[Client]) -> list[Client]:
        """Those that are far behind the first one to finish, or behind everything: they began together and work in step."""
        began = time.monotonic()
        deadline = began + _ANSWER_TIMEOUT
        waiting = list(clients)
        while waiting and (left := deadline - time.monotonic()) > 0:
            done, _, _ = select.select([client.stdout for client in waiting], [], [], left)
            waiting = [client for client in waiting if client.stdout not in done]
            if done and len(clients) - len(waiting) == len(done):  # the first to finish
                now = time.monotonic()
                deadline = now + max(_BEHIND, now - began)
        return waiting

    def _add(self, start: int, end: int) -> None:
        joining = ["--initial_peers", self.address] if self.address else ["--new_swarm"]
        place = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--no_auto_relay", "--skip_reachability_check", *joining]
        model = ["--device", "cpu", "--torch_dtype", "float32", "--throughput", "1.0", "--dht_prefix", self.PREFIX]
        command = [*self._peer, "server", str(self._threads), str(self.directory), "--block_indices", f"{start}:{end}", *model, *place]
        process = self.processes.start(command)
        deadline = time.monotonic() + _START_TIMEOUT
        while "Started" not in self.processes.log(process):
            if process.poll() is not None or time.monotonic() > deadline:
                raise self.processes.fail(process, "a Petals server did not start")
            time.sleep(0.1)
        found = _PETALS_ADDRESS.search(self.processes.log(process))
        if found is None:
            raise self.processes.fail(process, "a Petals server did not say its address")
        self.address = self.address or found[0]


class Client:
    """A client process: one JSON request a line, one JSON answer a line; see swarm_client.py and petals_peer.py."""

    def __init__(self, processes: Processes, command: Sequence[str]) -> None:
        self._processes = processes
        self.process = processes.start(command, env={"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin, self.stdout = self.process.stdin, self.process.stdout
        self._ready = False

    def wait_ready(self) -> None:
        if not self._ready:
            self.read()
            self._ready = True

    def send(self, **request: Any) -> None:
        self.wait_ready()
        self._stdin.write(json.dumps(request) + "\n")
        self._stdin.flush()

    def read(self) -> dict[str, Any]:
        patience = threading.Timer(_ANSWER_TIMEOUT, self.process.kill)
        patience.start()
        line = self.stdout.readline()
        patience.cancel()
        if not line:
            raise self._processes.fail(self.process, f"a client ended, or said nothing for {_ANSWER_TIMEOUT:g} s")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"a client failed: {answer['error']}")
        return answer

    def read_answers(self) -> list[Answer]:
        return [Answer(**answer) for answer in self.read()["answers"]]

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        return self.answers([prompt], new_tokens)[0]

    def answers(self, prompts: Sequence[Sequence[int]], new_tokens: int, **more: Any) -> list[Answer]:
        """All prompts at once, a session each."""
        self.send(prompts=[list(prompt) for prompt in prompts], new_tokens=new_tokens, **more)
        return self.read_answers()
