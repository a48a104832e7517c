"""What guesses save between distant machines: answers to plain questions, with each step's ring through proxies."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from invariance import prompts
from runners import Answer
from swarm_bench import DTYPES, Bench

DELAY = 0.1  # seconds one way
DRAFTS = 3  # what `corolla serve` guesses by default
NEW_TOKENS = 96  # at most: an answer ends where the model ends it
QUESTIONS = 2  # a round, none asked twice


def drafts(bench: Bench) -> None:
    for dtype in DTYPES:
        drafts_in(dtype, bench)


def drafts_in(dtype: str, bench: Bench) -> None:
    """The same questions to two swarms, one of which guesses; it has to answer the same tokens."""
    asked = prompts(bench.directory, QUESTIONS * (bench.options.rounds + 1))
    answered: dict[int, list[list[int]]] = {}
    name = f"questions answered at {DELAY * 1e3:.0f} ms one way, {dtype}: time per token"
    with bench.processes() as processes:
        swarms = {
            "without guesses": bench.swarm(processes, 3, dtype=dtype, proxied=True),
            "with guesses": bench.swarm(processes, 3, dtype=dtype, proxied=True, drafts=DRAFTS),
        }
        clients = {how: swarm.client() for how, swarm in swarms.items()}
        for how, client in clients.items():
            bench.check(how, client)

        def measure(how: str, number: int) -> Mapping[str, float]:
            swarm, client = swarms[how], clients[how]
            questions = asked[(number + 1) * QUESTIONS :][:QUESTIONS]
            swarm.set_delay(DELAY)
            chunks, held = swarm.chunks_held
            answers = [client.answers([question], NEW_TOKENS, ends=True)[0] for question in questions]
            chunks, held = swarm.chunks_held[0] - chunks, swarm.chunks_held[1] - held
            swarm.set_delay(0.0)
            token_ids = [answer.token_ids for answer in answers]
            if answered.setdefault(number, token_ids) != token_ids:
                raise SystemExit(f"{how} an answer is another one in round {number}")
            return {how: ms_per_token(answers), f"hops, {how}": 3e3 * held / chunks}

        figures = bench.rounds({how: functools.partial(measure, how) for how in swarms})
    for how in swarms:
        hops = figures[f"hops, {how}"]
        bounds: dict[str, Any] = {"reach": 1.1, "aim": 1.05, "at_most": True} if how == "with guesses" else {}
        bench.table.add(f"{name}, {how}", "ms", figures[how])
        bench.table.ratio(f"{name}, {how} / sum of the ring's 3 hops", "x", figures[how], hops, **bounds)
    bench.table.ratio(f"{name}, without / with guesses", "x", figures["without guesses"], figures["with guesses"])


def ms_per_token(answers: Sequence[Answer]) -> float:
    """Of all answers together, from each one's first token to its last."""
    seconds = sum(answer.times[-1] - answer.times[0] for answer in answers)
    return 1e3 * seconds / sum(len(answer.times) - 1 for answer in answers)
