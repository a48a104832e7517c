"""Well-formed messages with odd contents against three servers and two honest clients of one process.

    python -m tests.swarm.fuzz_messages --messages 100000 --seed 0
    python -m tests.swarm.fuzz_messages --replay fuzz-failure.txt

Two hostile peers send them in rounds. Beside every few of them an honest client goes on with its chat, and each of its tokens is compared
with the stock model's. After a round the hostile peers are gone: then the servers must hold nothing more for them. A round that fails is
written to a file that can be replayed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import msgspec
import psutil
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from corolla import barrier
from corolla.client.patience import Patience
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.engine.engine import Engine, EngineConfig
from corolla.errors import CallerError
from corolla.messages import Ping, Pong, WireMessage
from corolla.models.reference import Reference
from corolla.models.span import load_span
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm import frames
from corolla.swarm.network import LocalHub, LocalNetwork
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import Quality, Route, WantedAdapter, find_route
from corolla.types import GenerationSettings, Span
from tests.models import tiny
from tests.swarm.fuzz_strategies import BLOCKS, HONEST, HONEST_SESSIONS, HOSTILE, VOCABULARY, Sent, batches
from tests.swarm.judging import Verdict, judge
from tests.swarm.simulation import make_record

SPANS = {"a": (0, 2), "b": (2, 4), "s": (0, 4)}  # of the servers
T = TypeVar("T")
BATCH = 10  # messages between two turns of an honest chat
ROUND = 1000  # messages, after which the hostile peers are gone
DEADLINE = 60.0  # seconds for anything that should happen, on a loaded machine
LONGEST = 300  # tokens of an honest chat; then a new one is begun
MB = 2**20
WARM = 10  # rounds, after which kernels for most numbers of rows are compiled
GROWTH = 160 * MB  # of this process since then


class Honest:
    """A chat of an honest client that appends, rolls back, and stops early, and judges every token of its answers."""

    def __init__(self, hub: LocalHub, name: str, servers: Collection[str], reference: Reference, seed: int) -> None:
        self._servers, self._reference = servers, reference
        patience = Patience(silence=10.0, answer=10.0)  # on a loaded machine
        self.transport = SwarmTransport(hub.join(name), self, patience=patience, vocabulary=VOCABULARY)
        self._chance = random.Random(f"{name} {seed}")
        self.session = Session(self.transport, "")
        self.verdict = Verdict()
        self.tokens = 0
        self.longest = 0.0  # seconds for one turn

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None, adapter: WantedAdapter | None = None) -> Route:
        return find_route(self._records(), blocks=BLOCKS, now=time.time(), banned=avoid, needed_tokens=needed_tokens)

    def quicker(self, route: Route, avoid: Collection[str], needed_tokens: int, adapter: WantedAdapter | None = None) -> Route | None:
        return None

    def _records(self) -> list[ServerRecord]:
        return [make_record(name, *SPANS[name], blocks=BLOCKS, expires=time.time() + 1e6) for name in self._servers]

    def turn(self) -> None:
        """A few tokens more."""
        chance, session = self._chance, self.session
        if session.position > LONGEST:
            session.close()
            session = self.session = Session(self.transport, "")
        elif session.position and chance.random() < 0.3:
            session.rollback(chance.randrange(session.position))
        drawn = {"do_sample": True, "temperature": 0.9, "top_k": 50, "repetition_penalty": 1.2} if chance.random() < 0.5 else {}
        settings = GenerationSettings(max_tokens_to_generate=4, seed=chance.randrange(2**30), **drawn)
        prompt = [chance.randrange(3, VOCABULARY) for _ in range(chance.choice((3, 20, 40)))]
        history = [*session.tokens, *prompt]
        began, answer = time.monotonic(), session.generate(prompt, settings, timeout=DEADLINE)
        stop = chance.choice((None, None, 2))
        given = [token for token, _ in zip(answer, range(stop or 4), strict=False)]
        answer.close()
        self.longest = max(self.longest, time.monotonic() - began)
        self.tokens += len(given)
        self.verdict.add(judge(self._reference, history, [t.token_id for t in given], [t.logprob for t in given], settings))

    def rest(self) -> None:
        """End the chat; the next turn begins another."""
        self.session.close()
        self.session = Session(self.transport, "")


class Hostile:
    """A peer that sends what it is told, and listens for nothing but the answers to its pings."""

    def __init__(self, hub: LocalHub, name: str) -> None:
        self._network: LocalNetwork = hub.join(name)
        self._answered: dict[str, int] = {}
        self._nonce = 0
        self._network.listen(self._receive, lambda peer: None)

    def send(self, receiver: str, message: WireMessage) -> None:
        try:
            self._network.send(receiver, message)
        except CallerError:  # no frame holds it
            return

    def settle(self) -> None:
        """Return when every server has taken what was sent."""
        self._nonce += 1
        for server in SPANS:
            self._network.send(server, Ping(self._nonce))
        eventually(lambda: all(self._answered.get(server) == self._nonce for server in SPANS), lambda: f"pongs came from {self._answered}")

    def _receive(self, sender: str, message: WireMessage) -> None:
        if isinstance(message, Pong):
            self._answered[sender] = message.nonce


class Arena:
    """Servers a, b and s of a tiny model, alice who goes by a and b, bob who goes by s, and the hostile peers of a round."""

    def __init__(self, directory: Path, seed: int = 0) -> None:
        self.hub = LocalHub()
        self.engines: dict[str, Engine] = {}
        self.servers: dict[str, SpanServer] = {}
        for name, span in SPANS.items():
            engine = Engine(load_span(directory, Span(*span), dtype="float32"), EngineConfig(cache_tokens=2048, page_size=16, step_rows=64))
            engine.start()
            self.engines[name] = engine
            self.servers[name] = SpanServer(engine, self.hub.join(name), SpanServerConfig(wire_dtype="float32"))
        reference = Reference(directory)
        self.honest = {name: Honest(self.hub, name, servers, reference, seed) for name, servers in zip(HONEST, ("ab", "s"), strict=True)}
        self._hostile: dict[str, Hostile] = {}
        self._unexpected = Counter(barrier.unexpected)
        self.round: list[Sequence[Sent]] = []  # what was sent since the hostile peers came

    def play(self, batch: Sequence[Sent]) -> None:
        """Send a batch, with a turn of an honest chat beside it."""
        self.round.append(batch)
        if not self._hostile:
            self._hostile = {name: Hostile(self.hub, name) for name in HOSTILE}
        names = dict(zip(HONEST_SESSIONS, (honest.session.name for honest in self.honest.values()), strict=True))
        for sender, receiver, message in batch:
            session = getattr(message, "session", None)
            if session in names:
                message = msgspec.structs.replace(message, session=names[session])
            self._hostile[sender].send(receiver, message)
        self.honest[HONEST[len(self.round) % len(HONEST)]].turn()
        for hostile in self._hostile.values():
            hostile.settle()

    def end_round(self) -> None:
        """The hostile peers are gone, and nothing of them stays. Raises `AssertionError` where something does, or has gone wrong."""
        for name in HOSTILE:
            self.hub.kill(name)
        self._hostile.clear()
        for honest in self.honest.values():
            honest.turn()
            honest.rest()
        self.check()
        self.round.clear()

    def check(self) -> None:
        """Raises `AssertionError` where a server holds what it should not, or an honest client was told what is not so."""
        for name, server in self.servers.items():
            assert self.engines[name].healthy, f"the engine of {name} is dead or stalled: {self.engines[name].failure}"
            eventually(
                lambda server=server: not any(server.gauges.values()), lambda name=name, server=server: f"{name} holds {server.gauges}"
            )
        for name, honest in self.honest.items():
            assert not honest.verdict.wrong, f"{name}: {honest.verdict.wrong}"
            assert not honest.transport.bans.banned() & SPANS.keys(), f"{name} bans {honest.transport.bans.banned()}"
        assert barrier.unexpected == self._unexpected, f"barriers caught {barrier.unexpected - self._unexpected}"

    def close(self) -> None:
        for honest in self.honest.values():
            honest.transport.close()
        for server in self.servers.values():
            server.close()


@dataclass
class Report:
    """Of a whole run."""

    messages: Counter[str] = field(default_factory=Counter)  # by kind
    tokens: int = 0  # of honest clients
    verdict: Verdict = field(default_factory=Verdict)
    longest: float = 0.0  # seconds for one turn of an honest chat
    memory: list[int] = field(default_factory=list)  # bytes of the process, when a round had ended
    seconds: float = 0.0

    @property
    def growth(self) -> int:
        """Bytes, from the end of the round `WARM`, to the largest since; 0 in a shorter run."""
        return max(self.memory[WARM - 1 :], default=0) - self.memory[WARM - 1] if len(self.memory) >= WARM else 0

    def __str__(self) -> str:
        return (
            f"{self.messages.total()} messages of {len(self.messages)} kinds in {self.seconds:.0f} s: "
            f"{self.tokens} tokens of honest clients, {len(self.verdict.wrong)} wrong, {self.verdict.near_ties} near ties tipped, "
            f"log-probabilities at most {self.verdict.farthest:.1e} apart; a turn took at most {self.longest:.1f} s; "
            f"memory grew by {self.growth / MB:.0f} MB"
        )


def _held() -> int:
    """Bytes of this process, without those that its allocator keeps of what is free again: a peak of a round is no leak."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return int(psutil.Process().memory_info().rss)


def eventually(happened: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.002)


def drawn(strategy: st.SearchStrategy[T], count: int, seed: str) -> list[T]:
    """Examples of hypothesis, the same ones for the same seed. It remembers all that it draws: so draw a few at a time."""
    examples: list[T] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        derandomize=False,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def draw(example: T) -> None:
        examples.append(example)

    draw()
    return examples


class Run:
    """Batches played in rounds."""

    def __init__(self, arena: Arena, told: Callable[[Report], None] = lambda report: None) -> None:
        self._arena, self._told = arena, told
        self._began = time.monotonic()
        self.report = Report()

    def play(self, batches: Iterable[Sequence[Sent]]) -> None:
        """A round."""
        report, honest = self.report, self._arena.honest.values()
        for batch in batches:
            self._arena.play(batch)
            report.messages.update(type(sent.message).__name__ for sent in batch)
        self._arena.end_round()
        report.seconds = time.monotonic() - self._began
        report.memory.append(_held())
        report.verdict = Verdict()
        for chat in honest:
            report.verdict.add(chat.verdict)
        report.tokens = sum(chat.tokens for chat in honest)
        report.longest = max(chat.longest for chat in honest)
        assert report.growth < GROWTH, f"the process grew by {report.growth / MB:.0f} MB"
        self._told(report)


@contextmanager
def arena(directory: Path, seed: int = 0, failed: Path | None = None) -> Iterator[Arena]:
    """One that ends with the block. A round that fails is written to the file `failed`."""
    made = Arena(directory, seed)
    try:
        yield made
    except BaseException as error:
        if failed is not None:
            write(failed, made.round)
            count = sum(map(len, made.round))
            error.add_note(f"the {count} messages of the round: python -m tests.swarm.fuzz_messages --replay {failed}")
        raise
    finally:
        made.close()
    for engine in made.engines.values():
        engine.check_integrity()


def fuzz(
    directory: Path, messages: int, seed: int = 0, *, told: Callable[[Report], None] = lambda report: None, failed: Path | None = None
) -> Report:
    """Play so many messages; the same `seed` draws the same ones. A round that fails is written to the file `failed`."""
    with arena(directory, seed, failed) as made:
        run = Run(made, told)
        for number in range(-(-messages // ROUND)):
            count = min(ROUND, messages - number * ROUND)
            run.play(drawn(batches(SPANS, BATCH), -(-count // BATCH), f"{seed} {number}"))
    return run.report


def replay(directory: Path, batches: Iterable[Sequence[Sent]]) -> Report:
    """Play a round that `fuzz` has written."""
    with arena(directory) as made:
        run = Run(made)
        run.play(batches)
    return run.report


def write(path: Path, rounds: Iterable[Sequence[Sent]]) -> None:
    """A line for each message: who sends it to whom, its frame in hexadecimal, and what it is; an empty one between batches."""
    with path.open("w") as file:
        for batch in rounds:
            for sender, receiver, message in batch:
                try:
                    frame = b"".join(frames.encode(message))
                except CallerError:
                    continue
                print(sender, receiver, frame.hex(), repr(message)[:300], file=file)
            print(file=file)


def read(path: Path) -> list[list[Sent]]:
    rounds: list[list[Sent]] = [[]]
    for line in path.read_text().splitlines():
        if not line:
            rounds.append([])
            continue
        sender, receiver, frame, *_ = line.split(" ", 3)
        message: Any = frames.decode(bytes.fromhex(frame)[frames.LENGTH.size :])
        rounds[-1].append(Sent(sender, receiver, message))
    return [batch for batch in rounds if batch]


def main() -> int:
    parser = argparse.ArgumentParser(description="Well-formed messages with odd contents, against servers of this process.")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path, help="play a file that a failure left")
    parser.add_argument("--failed", type=Path, default=Path("fuzz-failure.txt"), help="where a round that fails is written")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        directory = tiny.save("llama", Path(folder))
        if given.replay:
            print(replay(directory, read(given.replay)))
        else:
            print(fuzz(directory, given.messages, given.seed, told=lambda report: print(report, flush=True), failed=given.failed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
