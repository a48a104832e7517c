"""Conversations of one session over servers between which messages are lost, late, repeated, overtaken or refused, checked token for
token against the stock model. `python -m tests.server.positions 500` runs five hundred of them."""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from corolla.client.patience import Patience
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.engine.sampler import SampleRequest, sample
from corolla.messages import Cancel, Close, FailedFrame, Gap, Scores, StepFrame, Token, WireMessage
from corolla.models.reference import Reference
from corolla.types import GenerationSettings
from tests.models import tiny
from tests.server.ring import Swarm

SPLITS = {1: ("0:4",), 2: ("0:2", "2:4"), 3: ("0:1", "1:3", "3:4"), 4: ("0:1", "1:2", "2:3", "3:4")}
KINDS = ("lost", "late", "very late", "twice", "again soon", "again later", "refused")
OF_A_SESSION = (StepFrame, Token, Cancel, Close, Gap, FailedFrame, Scores)
A_STEP_OR_TWO, OVERTAKEN, AFTER_RECOVERY = 0.003, 0.02, 0.5  # seconds
PATIENCE = Patience(silence=0.15, answer=0.3, lost=0.2, reconsider=60.0)
TIMEOUT = 60.0  # seconds for a token, on a loaded machine
NEAR = 1e-3  # natural logarithm, of float32 rows that were computed in other shapes
LONGEST = 400  # tokens of a history


@dataclass
class Faults:
    """Does to the messages at (turn, number of a message in it) what is planned. For `LocalHub.intercept`."""

    swarm: Swarm
    client: str
    plan: dict[tuple[int, int], str]
    turn: int = -1
    seen: int = 0
    done: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, sender: str, receiver: str, message: WireMessage) -> Sequence[tuple[float, WireMessage]]:
        if not isinstance(message, OF_A_SESSION):
            return [(0.0, message)]
        with self.lock:
            kind = self.plan.get((self.turn, self.seen), "")
            self.seen += 1
            if kind:
                self.done.append(f"{kind}: {type(message).__name__} from {sender} to {receiver}, {_described(message)}")
        if kind == "refused" and isinstance(message, StepFrame):
            busy = FailedFrame(message.session, message.generation, "Busy", "full", retry_after=0.05, peer=receiver)
            self.swarm.hub.carry(receiver, self.client, busy)
        return {
            "": [(0.0, message)],
            "lost": [],
            "refused": [],
            "late": [(OVERTAKEN, message)],
            "very late": [(AFTER_RECOVERY, message)],
            "twice": [(0.0, message), (0.0, message)],
            "again soon": [(0.0, message), (A_STEP_OR_TWO, message)],
            "again later": [(0.0, message), (OVERTAKEN, message), (AFTER_RECOVERY, message)],
        }[kind]

    def next_turn(self) -> None:
        with self.lock:
            self.turn, self.seen = self.turn + 1, 0


def _described(message: WireMessage) -> str:
    fields = ("generation", "start", "position", "have")
    return ", ".join(f"{name} {getattr(message, name)}" for name in fields if hasattr(message, name))


@dataclass(frozen=True)
class Answer:
    """What came after `history`."""

    history: list[int]
    tokens: list[int]
    logprobs: list[float]
    settings: GenerationSettings


def converse(swarm: Swarm, session: Session, chance: random.Random, turns: int) -> Iterator[Answer]:
    """Turns of one session: prompts of one chunk or several, greedy and drawn answers, some cancelled, some taken back and edited."""
    for _ in range(turns):
        if session.position and chance.random() < 0.7:  # a regenerated answer, an edited message
            session.rollback(chance.randint(0, session.position))
        if chance.random() < 0.3:
            moved = chance.choice(sorted(swarm.servers))
            swarm.servers[moved].leave()
            swarm.servers[moved].stay()
        room = LONGEST - session.position
        if room < 30:
            session.rollback(0)
        prompt = [chance.randrange(3, tiny.VOCABULARY) for _ in range(min(chance.choice((1, 5, 40, 150, 180)), max(1, room - 20)))]
        settings = GenerationSettings(
            max_tokens_to_generate=chance.choice((1, 4, 12)),
            do_sample=chance.random() < 0.5,
            temperature=0.8,
            seed=chance.randrange(1000),
            repetition_penalty=chance.choice((1.0, 1.3)),
        )
        stop = chance.choice((1, 3)) if chance.random() < 0.3 else 0
        history, came = [*session.tokens, *prompt], []
        tokens = session.generate(prompt, settings, timeout=TIMEOUT)
        for token in tokens:
            came.append(token)
            if len(came) == stop:
                tokens.close()
        yield Answer(history, [token.token_id for token in came], [token.logprob for token in came], settings)


def wrong(reference: Reference, answer: Answer) -> str | None:
    """Where an answer is not what the stock model gives, if it is not. Of two tokens that are as good as equal either is right."""
    with torch.inference_mode():
        every = answer.history + answer.tokens
        logits = reference.model(torch.tensor([every[:-1]])).logits[0, len(answer.history) - 1 :]
    logprobs = logits.log_softmax(-1)
    requests = [SampleRequest(answer.settings, at, every[:at]) for at in range(len(answer.history), len(every))]
    for index, (expected, token, logprob) in enumerate(zip(sample(logits, requests), answer.tokens, answer.logprobs, strict=True)):
        assert expected is not None
        if abs(float(logprobs[index, token]) - logprob) > NEAR:
            right = float(logprobs[index, token])
            return f"token {index} of {len(answer.tokens)} has log-probability {logprob:.4f}, and should have {right:.4f}"
        if expected.token_id != token and abs(expected.logprob - logprob) > NEAR:
            return f"token {index} of {len(answer.tokens)} is {token}, and should be {expected.token_id}"
    return None


def guess_badly(history: Sequence[int], token: int, most: int) -> tuple[int, ...]:
    """Rows of wrong guesses lie in the caches, where a step that comes again may find them."""
    return tuple((token + len(history) * index) % tiny.VOCABULARY for index in range(1, most + 1))


class Servers:
    """Swarms of one to four servers, each with a spare for every server."""

    def __init__(self, directory: Path) -> None:
        self.reference = Reference(directory)
        self._swarms: dict[int, Swarm] = {}
        for count, spans in SPLITS.items():
            swarm = self._swarms[count] = Swarm(directory, guess_badly)
            for index, span in enumerate(spans):
                start, end = map(int, span.split(":"))
                swarm.add(f"{'abcd'[index]}", start, end)
                swarm.add(f"{'abcd'[index]}-spare", start, end, throughput=50.0)

    def run(self, seed: int) -> None:
        """One conversation. Raises `AssertionError` with what was done to its messages where a token is wrong, or something stays."""
        chance = random.Random(seed)
        swarm = self._swarms[chance.choice(sorted(SPLITS))]
        client = f"client {seed} {time.monotonic_ns()}"
        turns = chance.randint(2, 4)
        # What goes wrong most goes wrong early in a turn, while a prompt's chunks are on their way.
        plan = {
            (chance.randrange(turns), chance.randrange(chance.choice((6, 30)))): chance.choice(KINDS) for _ in range(chance.choice((1, 2)))
        }
        faults = swarm.hub.intercept = Faults(swarm, client, plan)
        transport = SwarmTransport(swarm.hub.join(client), swarm, patience=PATIENCE, vocabulary=tiny.VOCABULARY)
        try:
            with Session(transport, "") as session:
                faults.next_turn()
                for answer in converse(swarm, session, chance, turns):
                    faults.next_turn()
                    problem = wrong(self.reference, answer)
                    assert problem is None, f"seed {seed}, {len(swarm.servers) // 2} servers: {problem}; {faults.done}"
        finally:
            swarm.hub.intercept = None
            transport.close()
        self._check_nothing_stays(swarm, seed)

    def _check_nothing_stays(self, swarm: Swarm, seed: int) -> None:
        deadline = time.monotonic() + TIMEOUT
        while held := {name: engine.gauges for name, engine in swarm.engines.items() if any(engine.gauges.values())}:
            assert time.monotonic() < deadline, f"seed {seed}: when the client was gone, servers still held {held}"
            time.sleep(0.01)

    def close(self) -> None:
        for swarm in self._swarms.values():
            swarm.close()


@contextmanager
def servers() -> Iterator[Servers]:
    with tempfile.TemporaryDirectory() as directory:
        running = Servers(tiny.save("llama", Path(directory)))
        try:
            yield running
        finally:
            running.close()


def main(count: int) -> None:
    first = random.randrange(2**31)
    with servers() as running:
        for number in range(count):
            running.run(first + number)
            print(f"\r{number + 1} of {count} conversations, from seed {first}", end="", flush=True)
    print(": every token and log-probability right")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
