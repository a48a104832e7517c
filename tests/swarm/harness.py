"""Real servers over real hivemind, for tests: started, hurt and ended; and clients of this process that time their answers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from corolla.client.counters import ask_counters
from corolla.client.discovery import join_swarm
from corolla.client.link import SwarmLink
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.errors import NetworkError, NoRoute
from corolla.messages import Message
from corolla.models.adapters import Adapter
from corolla.models.prompts import SoftPrompt
from corolla.swarm.peer import PeerConfig, SwarmPeer
from corolla.swarm.records import ServerRecord
from corolla.swarm.transport import Deliver, Link
from corolla.types import GenerationSettings, Step
from tests import forked
from tests.forked import Forked
from tests.swarm.chaos import ChaosProxy

DEADLINE = 120.0  # seconds for a process to start or to end on a loaded machine
PATIENCE = 90.0  # seconds for one token, whatever happens meanwhile
COROLLA = [sys.executable, "-c", "from corolla.cli.main import app; app()"]

GAUGES = ("sessions_open", "sessions_cached", "pages_held", "messages_waiting", "calls_waiting", "activations_kept")  # of `Counters`

OVER_HIVEMIND = [
    # hivemind finds its daemon through a deprecated function, and forks its DHT process, which Python 3.12 and later warn of.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # hivemind leaves it to the garbage collector to close what a dial that failed was asked for through.
    pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed transport <_SelectorSocketTransport:ResourceWarning"),
]
"""Marks of a module whose tests join a swarm from this process."""


@dataclass(eq=False)
class Server:
    """One `corolla` process, hivemind's process and the daemon below it: a process group of their own."""

    process: subprocess.Popen[bytes] | Forked
    ready_file: Path
    log: Path
    blocks: str = ""
    options: tuple[str, ...] = ()
    proxy: ChaosProxy | None = None
    ended: bool = field(default=False, init=False)  # by the test: it is no failure any more

    @property
    def address(self) -> str:
        """Where others join; the announced address where there is one."""
        return self.ready_file.read_text().split()[0]

    @property
    def peer(self) -> str:
        """The server's id."""
        return self.address.rsplit("/", 1)[1]

    @property
    def said(self) -> str:
        """Its standard output and error so far."""
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> Server:
        deadline = time.monotonic() + DEADLINE
        while not self.ready_file.exists():
            assert self.process.poll() is None, f"the server ended before it was ready:\n{self.said}"
            assert time.monotonic() < deadline, f"the server did not get ready:\n{self.said}"
            time.sleep(0.05)
        return self

    def signal(self, number: signal.Signals, *, alone: bool = False) -> None:
        """To the whole group as a machine's fault would be, or to the server's own process `alone`."""
        (os.kill if alone else os.killpg)(self.process.pid, number)

    def kill_daemon(self, name: str) -> None:
        """End one process below it: "p2pd", libp2p's daemon, or "dht", hivemind's."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        others = [child for child in below if not child.name().startswith("torch_shm")]  # torch's manager of shared memory
        victim = next(child for child in others if ("p2pd" in child.name()) == (name == "p2pd"))
        victim.kill()

    def kill(self) -> None:
        """End everything at once, as a power cut does."""
        self.ended = True
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)

    def leave(self) -> None:
        """Ask it to drain and to end, as a service manager does."""
        self.ended = True
        self.signal(signal.SIGTERM, alone=True)

    def end(self) -> None:
        """Kill what is left, and wait until it is gone."""
        self.kill()
        self.process.wait()
        if self.proxy is not None:
            self.proxy.close()


class Swarm:
    """The processes of one swarm around a bootstrap node that stays; all of them end with `close`.

    `options` are those of every `corolla serve`; `secret` is the swarm's. The processes are forked from one that has imported
    everything, unless they are to be `started` as a user starts them.
    """

    def __init__(self, directory: Path, folder: Path, *options: str, secret: str = "", started: bool = False) -> None:
        self.directory, self.folder, self.options = directory, folder, options
        self._environment = {**os.environ, "COROLLA_SECRET": secret} if secret else None
        self._started = started
        self.servers: list[Server] = []  # in order of their start, the dead among them
        self._bootstrap_port = free_port()
        self.bootstrap = self._run_bootstrap()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where others join: of the bootstrap node, once it is ready."""
        return self.bootstrap.wait_ready().address

    @property
    def living(self) -> list[Server]:
        return [server for server in self.servers if not server.ended]

    def serve(self, *spans: str, options: Sequence[str] = (), proxied: bool = False) -> list[Server]:
        """Servers of these blocks, started side by side; a proxied one is dialled through a `ChaosProxy`. Waits for none of them."""
        started = [self._serve(blocks, tuple(options), proxied) for blocks in spans]
        self.servers += started
        return started

    def replace(self, *dead: Server) -> list[Server]:
        """New servers of the same blocks. Waits for none of them."""
        started = [self._serve(server.blocks, server.options, server.proxy is not None) for server in dead]
        self.servers += started
        return started

    def restart_bootstrap(self, down: float) -> None:
        """Kill the bootstrap node; after `down` seconds start it again, at the same address and with the same key."""
        self.bootstrap.end()
        time.sleep(down)
        self.bootstrap = self._run_bootstrap()

    def _run_bootstrap(self) -> Server:
        return self.run("bootstrap", "--port", str(self._bootstrap_port), "--identity", str(self.folder / "bootstrap.key"))

    def wait_ready(self) -> None:
        for server in self.living:
            server.wait_ready()

    def of(self, peer: str) -> Server:
        """The server of that id."""
        return next(server for server in self.servers if server.ready_file.exists() and server.peer == peer)

    def status(self, *options: str) -> list[dict[str, Any]]:
        """What `corolla status --json` prints."""
        done = forked.run("status", "--json", "--peers", self.address, *options, timeout=DEADLINE)
        assert done.returncode == 0, done.stderr
        records: list[dict[str, Any]] = json.loads(done.stdout)
        return records

    def close(self) -> None:
        for server in (*self.servers, self.bootstrap):
            server.kill()
        for server in (*self.servers, self.bootstrap):
            server.end()

    def _serve(self, blocks: str, options: tuple[str, ...], proxied: bool) -> Server:
        command = ["serve", str(self.directory), "--peers", self.address, "--blocks", blocks, *self.options, *options]
        if not proxied:
            return self.run(*command, blocks=blocks, options=options)
        port = free_port()
        proxy = ChaosProxy(port, seed=len(self.servers))
        proxy.start()
        return self.run(*command, "--port", str(port), "--announce", proxy.address, blocks=blocks, options=options, proxy=proxy)

    def run(self, *command: str, blocks: str = "", options: tuple[str, ...] = (), proxy: ChaosProxy | None = None) -> Server:
        """A command that stays, begun."""
        number = sum(1 for _ in self.folder.glob("log-*"))
        ready, log = self.folder / f"ready-{number}", self.folder / f"log-{number}"
        command = (*command, "--ready-file", str(ready))
        process: subprocess.Popen[bytes] | Forked
        with log.open("wb") as output:
            if self._started:
                process = subprocess.Popen(
                    [*COROLLA, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=self._environment,
                )
            else:
                process = forked.start(*command, output=output, env=self._environment)
        return Server(process, ready, log, blocks, options, proxy)


def at_most(seconds: float) -> float:
    """A limit for a quiet machine, widened by as many times as others keep this one's cores busy."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def free_port() -> int:
    """A port of loopback that nobody listens at now, and that the system gives to no connection: those begin at 32768."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000)))
            return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, the seconds before each of them, and their log-probabilities as the server of the head gave them."""

    tokens: list[int]
    pauses: list[float]
    logprobs: list[float]

    @property
    def longest(self) -> float:
        return max(self.pauses)


class Slowed:
    """A server that computes for a tenth of the time, until the block ends: its machine has other things to do."""

    def __init__(self, server: Server, *, running: float = 0.01, standing: float = 0.09) -> None:
        self._server, self._running, self._standing = server, running, standing
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._alternate, daemon=True)

    def __enter__(self) -> Slowed:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _alternate(self) -> None:
        while not self._over.wait(self._running):
            self._server.signal(signal.SIGSTOP)
            time.sleep(self._standing)
            self._server.signal(signal.SIGCONT)


class Client:
    """A client of a swarm in this process, until `close`; several chats at a time may go through it."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._stack = ExitStack()
        self.transport: SwarmTransport = asyncio.run(self._join())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def _join(self) -> SwarmTransport:
        # While an event loop runs, or hivemind makes one and leaves it open.
        config = PeerConfig(initial_peers=[self._swarm.address], client_mode=True)
        return self._stack.enter_context(join_swarm(self._swarm.directory, config)).transport

    def close(self) -> None:
        self._stack.close()

    def chat(self, *, patience: float = PATIENCE, prompt: SoftPrompt | None = None, adapter: Adapter | str | None = None) -> Chat:
        return Chat(self.transport, patience, prompt, adapter)

    def wait_until_known(self, *servers: Server) -> None:
        """Return when the client would take any of these servers that hold the same blocks as others."""
        deadline = time.monotonic() + DEADLINE
        for server in servers:
            server.wait_ready()
            others = {o.peer for o in self._swarm.servers if o.ready_file.exists() and (o.ended or o.blocks == server.blocks)}
            while not self._takes(server.peer, others - {server.peer}):
                assert time.monotonic() < deadline, f"the client does not find {server.blocks} at {server.peer}:\n{server.said}"
                time.sleep(0.1)

    def _takes(self, peer: str, others: set[str]) -> bool:
        try:
            return peer in self.transport.router.route(others, 1).peers
        except (NoRoute, NetworkError):
            return False


class Chat:
    """One session through the swarm that tells its route and times its tokens."""

    def __init__(
        self, transport: SwarmTransport, patience: float, prompt: SoftPrompt | None = None, adapter: Adapter | str | None = None
    ) -> None:
        self._seam = _Seam(transport)
        self._patience = patience
        self.session = Session(self._seam, "", prompt, adapter)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def route(self) -> tuple[str, ...]:
        """The servers of the session now, by id."""
        route = self._seam.link.route
        return route.peers if route is not None else ()

    def give_up(self, hop: int) -> None:
        """Treat a server of the route as lost."""
        self._seam.link.lost(self.route[hop], NetworkError("it is given up on purpose"))

    def answer(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        at: Mapping[int, Callable[[], object]] | None = None,
        stop: int | None = None,
    ) -> Answer:
        """An answer, timed; `at` says what to do when so many tokens are there, 0 being as soon as the prompt was sent.

        With `stop` it is cancelled after so many tokens.
        """
        at = at or {}
        tokens: list[int] = []
        logprobs: list[float] = []
        pauses: list[float] = []
        self._seam.once_sent = at.get(0)
        before = time.monotonic()
        answer = self.session.generate(prompt, settings, timeout=self._patience)
        for token in answer:
            now = time.monotonic()
            tokens.append(token.token_id)
            logprobs.append(token.logprob)
            pauses.append(now - before)
            before = now
            if len(tokens) in at:
                at[len(tokens)]()
            if len(tokens) == stop:
                answer.close()
        return Answer(tokens, pauses, logprobs)

    def close(self) -> None:
        self.session.close()


class _Seam:
    """A transport between a session and the swarm's: tells when a step has gone out, and keeps the link."""

    def __init__(self, transport: SwarmTransport) -> None:
        self._transport = transport
        self.link: SwarmLink
        self.once_sent: Callable[[], object] | None = None

    def connect(self, peer: str, deliver: Deliver) -> Link:
        self.link = self._transport.connect(peer, deliver)
        return self

    def send(self, message: Message) -> None:
        self.link.send(message)
        if isinstance(message, Step) and self.once_sent is not None:
            act, self.once_sent = self.once_sent, None
            act()

    def close(self) -> None:
        self.link.close()


class Observer:
    """Looks into a swarm's directory from this process, until `close`."""

    def __init__(self, swarm: Swarm) -> None:
        self._peer = asyncio.run(self._join(swarm.address))

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._peer.close()

    async def _join(self, address: str) -> SwarmPeer:
        return SwarmPeer(PeerConfig(initial_peers=[address], client_mode=True))

    def records(self) -> list[ServerRecord]:
        return self._peer.servers()

    def gauges(self, servers: Sequence[Server]) -> dict[str, dict[str, int]]:
        """What each of the servers holds for clients, by id; of those that answer."""
        self._peer.servers()  # learns their addresses
        counts = ask_counters(self._peer.network, [server.peer for server in servers], DEADLINE)
        return {peer: {name: of[name] for name in GAUGES if name in of} for peer, of in counts.items()}
