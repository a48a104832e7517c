"""Churn: servers killed, told to leave, hung and added under chats. Every token is checked, memory and descriptors are watched.

    python -m tests.swarm.soak --minutes 20

prints a report, and ends with 1 when a token was wrong or an answer failed. `test_churn.py` runs a short form.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from signal import SIGSTOP
from threading import Event

import psutil
import torch

from corolla.engine.sampler import SampleRequest, sample
from corolla.errors import CorollaError
from corolla.models.reference import Reference
from corolla.types import GenerationSettings
from tests.models import tiny
from tests.swarm.harness import Answer, Client, Server, Swarm

SPANS = ("0:1", "1:3", "3:4")
MB = 2**20
TOLERANCE = 1e-3  # nats; float32 in another order of its sums stays below a tenth of it


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    seconds: float = 1200.0
    chats: int = 8
    every: float = 10.0  # seconds from one server killed or added to the next
    longest: int = 600  # tokens of a session; then a new one is begun
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
    near_ties: int = 0  # tokens that another order of the same sums may give just as well
    farthest: float = 0.0  # of a token's log-probability from the stock model's
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)  # the longest of each answer, in seconds
    usage: dict[str, list[Usage]] = field(default_factory=dict)

    def growth(self, name: str, since: float) -> tuple[int, int]:
        """By how many bytes and descriptors a process grew after `since` seconds: the medians of the last and first looks."""
        looks = [usage for usage in self.usage[name] if usage.seconds >= since]
        third = max(1, len(looks) // 3)
        first, last = looks[:third], looks[-third:]
        return (
            sorted(u.memory for u in last)[third // 2] - sorted(u.memory for u in first)[third // 2],
            sorted(u.descriptors for u in last)[third // 2] - sorted(u.descriptors for u in first)[third // 2],
        )

    def print(self, minutes: Sequence[float] = (1, 2, 5, 10, 15, 20)) -> None:
        print(", ".join(f"{count} {event}" for event, count in sorted(self.events.items())))
        print(f"{self.answers} answers of {self.tokens} tokens; {len(self.wrong)} wrong tokens, {len(self.failed)} answers failed")
        print(f"{self.near_ties} near ties tipped; log-probabilities at most {self.farthest:.1e} from the stock model's")
        ordered = sorted(self.pauses)
        for share in (0.5, 0.9, 0.99):
            print(f"longest pause in {share:.0%} of the answers: at most {ordered[int(share * (len(ordered) - 1))]:.2f} s")
        print(f"longest pause: {ordered[-1]:.2f} s")
        for name, looks in self.usage.items():
            for minute in minutes:
                look = min(looks, key=lambda usage: abs(usage.seconds - 60 * minute))
                if abs(look.seconds - 60 * minute) < 30:
                    print(f"{name}, minute {minute:g}: {look.memory / MB:.0f} MB, {look.descriptors} descriptors")
        for line in (*self.wrong, *self.failed):
            print(line)


class Soak:
    """Chats on threads of their own; events, checks and looks on the caller's."""

    def __init__(self, swarm: Swarm, client: Client, config: SoakConfig) -> None:
        self._swarm, self._client, self._config = swarm, client, config
        self._chance = random.Random(config.seed)
        self._reference = Reference(swarm.directory)
        self._said: SimpleQueue[tuple[list[int], Answer, GenerationSettings]] = SimpleQueue()
        self._over = Event()
        self._hung: list[Server] = []
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
                self._check_one(timeout=0.2)
            self._over.set()
            for chat in chats:
                chat.result()
        while self._check_one(timeout=0.0):
            pass
        return self.report

    def _chat(self, number: int) -> None:
        chance = random.Random(f"{self._config.seed} {number}")
        while not self._over.is_set():
            history: list[int] = []
            with self._client.chat() as chat:
                while len(history) < self._config.longest and not self._over.is_set():
                    prompt = [chance.randrange(3, tiny.VOCABULARY) for _ in range(chance.randint(5, 40))]
                    drawn = GenerationSettings(do_sample=True, temperature=0.9, top_p=0.95, top_k=50, seed=chance.randrange(2**30))
                    settings = drawn if number % 2 else GenerationSettings(max_tokens_to_generate=chance.randint(20, 80))
                    history += prompt
                    try:
                        answer = chat.answer(prompt, settings)
                    except CorollaError as error:
                        self.report.failed.append(f"chat {number} at {len(history)}: {error!r}")
                        break
                    self.report.answers += 1
                    self.report.tokens += len(answer.tokens)
                    self.report.pauses.append(answer.longest)
                    self._said.put((list(history), answer, settings))
                    history += answer.tokens
                    self._over.wait(chance.uniform(0.0, 0.5))

    def _change(self) -> None:
        """Kill a server where there are two of its span, or add one where there are not."""
        for server in self._hung:
            server.kill()
        self._hung.clear()
        held = Counter(server.blocks for server in self._swarm.living)
        if scarce := [span for span in SPANS if held[span] < 2]:
            self._swarm.serve(self._chance.choice(scarce))
            self.report.events["added"] += 1
            return
        ready = Counter(server.blocks for server in self._swarm.living if server.ready_file.exists())
        able = [server for server in self._swarm.living if server is not self._elder and ready[server.blocks] > 1]
        if not able:
            return
        victim = self._chance.choice(able)
        event = self._chance.choices(["killed", "left", "hung"], [6, 2, 2])[0]
        self.report.events[event] += 1
        if event == "killed":
            victim.kill()
        elif event == "left":
            victim.leave()
        else:
            victim.ended = True
            victim.signal(SIGSTOP)
            self._hung.append(victim)

    def _look(self, now: float) -> None:
        roots = {"client": os.getpid(), "server": self._elder.process.pid, "bootstrap": self._swarm.bootstrap.process.pid}
        for name, pid in roots.items():
            root = psutil.Process(pid)
            # The swarm's processes are children of the client's only because it started them.
            others = {server.process.pid for server in (*self._swarm.servers, self._swarm.bootstrap)} - {pid}
            memory, descriptors = root.memory_info().rss, root.num_fds()
            for child in root.children():
                if child.pid not in others:
                    for process in (child, *child.children(recursive=True)):
                        memory += process.memory_info().rss
                        descriptors += process.num_fds()
            self.report.usage.setdefault(name, []).append(Usage(now, memory, descriptors))

    @torch.inference_mode()
    def _check_one(self, timeout: float) -> bool:
        """Compare one answer with what the stock model gives after the same tokens; False when none waits."""
        try:
            history, answer, settings = self._said.get(timeout=timeout) if timeout else self._said.get_nowait()
        except Empty:
            return False
        tokens = answer.tokens
        everything = history + tokens
        logits = self._reference.model(torch.tensor([everything[:-1]])).logits[0, len(history) - 1 :]
        # A row that is wrong in some server's cache changes few tokens, but every probability behind it.
        apart = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0] - torch.tensor(answer.logprobs)
        self.report.farthest = max(self.report.farthest, float(apart.abs().max()))
        if bool((apart.abs() > TOLERANCE).any()):
            row = int((apart.abs() > TOLERANCE).int().argmax())
            self.report.wrong.append(f"log-probability {apart[row]:+.1e} off at {len(history) + row}, {settings}")
        requests = [SampleRequest(settings, place, everything[:place]) for place in range(len(history), len(everything))]
        for row, expected in enumerate(sample(logits, requests)):
            if expected.token_id == tokens[row]:
                continue
            nearby = logits[row] + 1e-4 * torch.randn(200, logits.shape[1])
            if any(other.token_id == tokens[row] for other in sample(nearby, [requests[row]] * len(nearby))):
                self.report.near_ties += 1
            else:
                self.report.wrong.append(
                    f"token {tokens[row]}, number {row} of {len(tokens)} behind {len(history)} others, where {expected.token_id} belongs; "
                    f"its log-probability is {apart[row]:+.1e} off; {settings}"
                )
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Churn under chats, with every token checked.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--every", type=float, default=10.0, help="seconds from one server killed or added to the next")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    config = SoakConfig(seconds=60 * given.minutes, chats=given.chats, every=given.every, seed=given.seed)
    print(
        f"{given.minutes:g} minutes, {given.chats} chats, a server killed or added every {given.every:g} s, seed {given.seed}", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), config)
    report.print()
    return 1 if report.wrong or report.failed else 0


def soak(folder: Path, config: SoakConfig) -> Report:
    """A swarm with two servers for each span, and the churn on it."""
    directory = tiny.save("llama", folder / "model", max_position_embeddings=4096)
    with Swarm(directory, folder, "--dtype", "float32") as swarm:
        servers = swarm.serve(*SPANS, *SPANS)
        swarm.wait_ready()
        with Client(swarm) as client:
            client.wait_until_known(*servers)
            return Soak(swarm, client, config).run()


if __name__ == "__main__":
    sys.exit(main())
