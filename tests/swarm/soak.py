"""Churn: servers killed, told to leave, hung, woken, robbed of their daemons and added; a bootstrap node restarted; hostile members beside.

    python -m tests.swarm.soak --minutes 20

Under it chats go on, roll back, cancel and edit. Every token is checked, memory and descriptors are watched, and when the clients are gone
the servers must hold nothing more for them. Prints a report, and ends with 1 when a token was wrong, an answer failed, or something stayed.
`test_churn.py` runs a short form.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from signal import SIGCONT, SIGSTOP
from threading import Event, Lock

import psutil
import torch

from corolla.errors import CorollaError
from corolla.models.reference import Reference
from corolla.types import GenerationSettings
from tests.models import tiny
from tests.swarm.harness import DEADLINE, Answer, Chat, Client, Observer, Server, Swarm, at_most
from tests.swarm.hostile_member import SPANS as BLOCKS
from tests.swarm.judging import Verdict, judge

SPANS = tuple(f"{start}:{end}" for start, end in BLOCKS.values())
MB = 2**20
EVENTS = {"killed": 6, "left": 2, "hung": 2, "stopped": 6, "lost p2pd": 2, "lost dht": 2, "bootstrap restarted": 1, "member replaced": 2}
RESTARTS_WITHIN = 60.0  # seconds, in which a server that lost a daemon has to end


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    seconds: float = 1200.0
    chats: int = 8
    every: float = 10.0  # seconds from one event to the next
    longest: int = 900  # tokens of a session; then a new one is begun
    watch: float = 10.0  # seconds between two looks at memory and descriptors
    seed: int = 0


@dataclass(frozen=True)
class Usage:
    """Of one long-lived process and its children, so many seconds after the start."""

    seconds: float
    memory: int  # bytes, resident
    descriptors: int


@dataclass
class Report:
    """What happened."""

    events: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    tokens: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    failed: list[str] = field(default_factory=list)  # answers, and servers that ended or stayed where they should not
    left: list[str] = field(default_factory=list)  # what servers hold when all clients are gone
    pauses: list[float] = field(default_factory=list)  # the longest of each answer, in seconds
    usage: dict[str, list[Usage]] = field(default_factory=dict)

    def growth(self, name: str, since: float) -> tuple[int, int]:
        """By how many bytes and descriptors a process grew after `since` seconds: the medians of the last and first looks."""
        looks = [usage for usage in self.usage[name] if usage.seconds >= since]
        if not looks:
            return 0, 0  # it was started again at the end
        third = max(1, len(looks) // 3)
        first, last = looks[:third], looks[-third:]
        return (
            sorted(u.memory for u in last)[third // 2] - sorted(u.memory for u in first)[third // 2],
            sorted(u.descriptors for u in last)[third // 2] - sorted(u.descriptors for u in first)[third // 2],
        )

    def print(self, minutes: Sequence[float] = (1, 2, 5, 10, 15, 20)) -> None:
        print(", ".join(f"{count} {event}" for event, count in sorted(self.events.items())))
        verdict = self.verdict
        print(f"{self.answers} answers of {self.tokens} tokens; {len(verdict.wrong)} wrong tokens, {len(self.failed)} answers failed")
        print(f"{verdict.near_ties} near ties tipped; log-probabilities at most {verdict.farthest:.1e} from the stock model's")
        print(f"{len(self.left)} servers hold something when all clients are gone")
        ordered = sorted(self.pauses)
        for share in (0.5, 0.9, 0.99):
            print(f"longest pause in {share:.0%} of the answers: at most {ordered[int(share * (len(ordered) - 1))]:.2f} s")
        print(f"longest pause: {ordered[-1]:.2f} s")
        for name, looks in self.usage.items():
            for minute in minutes:
                look = min(looks, key=lambda usage: abs(usage.seconds - 60 * minute))
                if abs(look.seconds - 60 * minute) < 30:
                    print(f"{name}, minute {minute:g}: {look.memory / MB:.0f} MB, {look.descriptors} descriptors")
        for line in (*verdict.wrong, *self.failed, *self.left):
            print(line)


class Soak:
    """Chats on threads of their own; events, checks and looks on the caller's."""

    def __init__(self, swarm: Swarm, client: Client, config: SoakConfig) -> None:
        self._swarm, self._client, self._config = swarm, client, config
        self._chance = random.Random(config.seed)
        self._reference = Reference(swarm.directory)
        self._said: SimpleQueue[tuple[list[int], Answer, GenerationSettings]] = SimpleQueue()
        self._over = Event()
        self._lock = Lock()  # of the report's counts
        self._hung: list[Server] = []
        self._stopped: list[tuple[float, Server]] = []  # and when they wake
        self._robbed: list[tuple[float, Server]] = []  # and when they must have ended
        self._member: subprocess.Popen[bytes] | None = None
        self.report = Report()
        # One server stays throughout: its memory and descriptors are those of a server under churn.
        self._elder = swarm.living[0]

    def run(self) -> Report:
        config, began = self._config, time.monotonic()
        event_at, look_at = config.every, 0.0
        with ThreadPoolExecutor(config.chats) as threads:
            chats = [threads.submit(self._chat, number) for number in range(config.chats)]
            while (now := time.monotonic() - began) < config.seconds:
                if now >= event_at:
                    event_at += config.every
                    self._change()
                if now >= look_at:
                    look_at += config.watch
                    self._look(now)
                self._wake(time.monotonic())
                self._manage(time.monotonic())
                self._check_one(timeout=0.2)
            self._over.set()
            self._wake(float("inf"))
            for chat in chats:
                chat.result()
            while self._robbed:  # a server that lost its daemon at last ends by itself, too, and is started again
                self._manage(time.monotonic())
                self._check_one(timeout=0.2)
        while self._check_one(timeout=0.0):
            pass
        self._end_member()
        return self.report

    def _count(self, event: str) -> None:
        with self._lock:
            self.report.events[event] += 1

    def _chat(self, number: int) -> None:
        chance = random.Random(f"{self._config.seed} {number}")
        while not self._over.is_set():
            with self._client.chat() as chat:
                try:
                    self._talk(number, chat, chance)
                except CorollaError as error:
                    self.report.failed.append(f"chat {number} at {chat.session.position}: {error!r}")

    def _talk(self, number: int, chat: Chat, chance: random.Random) -> None:
        session, at = chat.session, 0  # where the last prompt began
        prompt: list[int] = []
        while session.position < self._config.longest and not self._over.is_set():
            edit = chance.choice(("rolled back", "regenerated", "shortened", *[""] * 4)) if prompt else ""
            if edit == "rolled back":
                session.rollback(chance.randrange(1, session.position))
            elif edit:
                session.rollback(at)
            if edit == "shortened":
                prompt = prompt[: 1 + len(prompt) // 2]
            elif edit != "regenerated":
                prompt = [chance.randrange(3, tiny.VOCABULARY) for _ in range(chance.choice((6, 20, 40, 300)))]
            drawn = GenerationSettings(do_sample=True, temperature=0.9, top_p=0.95, top_k=50, seed=chance.randrange(2**30))
            settings = drawn if number % 2 else GenerationSettings(max_tokens_to_generate=chance.randint(20, 80))
            stop = chance.choice((None, None, chance.randint(1, 10)))
            at = session.position
            history = [*session.tokens, *prompt]
            answer = chat.answer(prompt, settings, stop=stop)
            for event in filter(None, (edit, "cancelled" if len(answer.tokens) == stop else "")):
                self._count(event)
            with self._lock:
                self.report.answers += 1
                self.report.tokens += len(answer.tokens)
                self.report.pauses.append(answer.longest)
            self._said.put((history, answer, settings))
            self._over.wait(chance.uniform(0.0, 0.5))

    def _change(self) -> None:
        """Add servers where there are not two of a span, and do one thing more."""
        for server in self._hung:
            server.kill()
        self._hung.clear()
        held = Counter(server.blocks for server in self._swarm.living)
        for span in SPANS:
            if held[span] < 2:
                self._swarm.serve(span)
                self._count("added")
        if self._member is None:
            self._replace_member()
        troubled = {server for _, server in (*self._stopped, *self._robbed)}
        ready = [server for server in self._swarm.living if server.ready_file.exists() and server not in troubled]
        of_span = Counter(server.blocks for server in ready)
        able = [server for server in ready if of_span[server.blocks] > 1 and server is not self._elder]
        event = self._chance.choices(list(EVENTS), list(EVENTS.values()))[0]
        if event == "bootstrap restarted":
            self._swarm.wait_ready()  # servers that join just now join through it
            self._swarm.restart_bootstrap(down=self._chance.uniform(1.0, 15.0))
            self.report.usage.pop("bootstrap", None)  # another process, which grows from nothing
        elif event == "member replaced":
            self._replace_member()
        elif not able:
            return
        else:
            self._hurt(event, self._chance.choice(able))
        self._count(event)

    def _hurt(self, event: str, victim: Server) -> None:
        if event == "killed":
            victim.kill()
        elif event == "left":
            victim.leave()
        elif event == "hung":
            victim.ended = True
            victim.signal(SIGSTOP)
            self._hung.append(victim)
        elif event == "stopped":
            victim.signal(SIGSTOP)
            self._stopped.append((time.monotonic() + self._chance.choice((0.5, 2.5, 4.0, 6.0, 12.0)), victim))
        else:
            victim.kill_daemon(event.removeprefix("lost "))
            self._robbed.append((time.monotonic() + at_most(RESTARTS_WITHIN), victim))

    def _wake(self, now: float) -> None:
        """Those whose time has come."""
        for until, server in self._stopped:
            if until <= now:
                with suppress(ProcessLookupError):
                    server.signal(SIGCONT)
        self._stopped = [(until, server) for until, server in self._stopped if until > now]

    def _manage(self, now: float) -> None:
        """As a service manager does: a server that ends with an error is started again. Only those that lost a daemon may, and must."""
        robbed = {server for _, server in self._robbed}
        for server in self._swarm.living:
            code = server.process.poll()
            if code is None:
                continue
            if code <= 0 or server not in robbed:
                self.report.failed.append(f"the server of {server.blocks} ended with {code}: {server.said[-500:]}")
            server.end()
            self._swarm.replace(server)
            self._count("started again")
        for until, server in self._robbed:
            if until <= now and not server.ended:
                self.report.failed.append(f"the server of {server.blocks} goes on without its daemon: {server.said[-500:]}")
                server.kill()
        self._robbed = [(until, server) for until, server in self._robbed if not server.ended]

    def _replace_member(self) -> None:
        """The hostile members are gone at once, and others come."""
        self._end_member()
        arguments = [self._swarm.address, self._client.transport.network.me, str(self._chance.randrange(2**30))]
        with (self._swarm.folder / "hostile").open("ab") as output:
            self._member = subprocess.Popen(
                [sys.executable, "-m", "tests.swarm.hostile_member", *arguments], stdout=output, stderr=output, start_new_session=True
            )

    def _end_member(self) -> None:
        if self._member is not None:
            for process in (*psutil.Process(self._member.pid).children(recursive=True), self._member):
                process.kill()
            self._member.wait()
            self._member = None

    def _look(self, now: float) -> None:
        roots = {"client": os.getpid(), "server": self._elder.process.pid, "bootstrap": self._swarm.bootstrap.process.pid}
        if not self._swarm.bootstrap.ready_file.exists():
            del roots["bootstrap"]  # it has just been started again
        for name, pid in roots.items():
            root = psutil.Process(pid)
            # The swarm's processes are children of the client's only because it started them.
            others = {server.process.pid for server in (*self._swarm.servers, self._swarm.bootstrap)} - {pid}
            others |= {self._member.pid} if self._member is not None else set()
            memory, descriptors = root.memory_info().rss, root.num_fds()
            for child in root.children():
                if child.pid not in others:
                    for process in (child, *child.children(recursive=True)):
                        memory += process.memory_info().rss
                        descriptors += process.num_fds()
            self.report.usage.setdefault(name, []).append(Usage(now, memory, descriptors))

    def _check_one(self, timeout: float) -> bool:
        """Compare one answer with what the stock model gives after the same tokens; False when none waits."""
        try:
            history, answer, settings = self._said.get(timeout=timeout) if timeout else self._said.get_nowait()
        except Empty:
            return False
        self.report.verdict.add(judge(self._reference, history, answer.tokens, answer.logprobs, settings))
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Churn under chats, with every token checked.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--every", type=float, default=10.0, help="seconds from one event to the next")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    config = SoakConfig(seconds=60 * given.minutes, chats=given.chats, every=given.every, seed=given.seed)
    print(f"{given.minutes:g} minutes, {given.chats} chats, something happens every {given.every:g} s, seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), config)
    report.print()
    return 1 if report.verdict.wrong or report.failed or report.left else 0


def soak(folder: Path, config: SoakConfig) -> Report:
    """A swarm with two servers for each span, and the churn on it."""
    directory = tiny.save("llama", folder / "model", max_position_embeddings=4096)
    with Swarm(directory, folder, "--dtype", "float32", started=True) as swarm:
        servers = swarm.serve(*SPANS, *SPANS)
        swarm.wait_ready()
        with Client(swarm) as client:
            client.wait_until_known(*servers)
            report = Soak(swarm, client, config).run()
        report.left = _left(swarm)
        return report


def _left(swarm: Swarm) -> list[str]:
    """What servers still hold a while after the last client has gone."""
    deadline = time.monotonic() + DEADLINE
    swarm.wait_ready()
    with Observer(swarm) as observer:
        while True:
            gauges = observer.gauges(swarm.living)
            silent = {server.peer for server in swarm.living} - gauges.keys()
            left = [f"{peer} holds {held}" for peer, held in gauges.items() if any(held.values())] + [
                f"{peer} is silent" for peer in silent
            ]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
