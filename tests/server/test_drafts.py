"""Guesses, which the server with the head makes, on their way round the ring: whatever is guessed, answers are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from corolla.client.session import Session
from corolla.engine.speculation import Guess
from tests.models import tiny
from tests.server.ring import PROMPT, SAMPLED, TIMEOUT, Swarm, answer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def knowing(answer: list[int], *, right: int) -> Guess:
    """Guesses the answer to `PROMPT`: `right` tokens as they are there, and the others wrong."""
    text = [*PROMPT, *answer]

    def oracle(history: Sequence[int], token: int, most: int) -> tuple[int, ...]:
        following = text[len(history) + 1 :][:most]
        return tuple(token if place < right else (token + 1) % tiny.VOCABULARY for place, token in enumerate(following))

    return oracle


@pytest.fixture
def plain(directory: Path) -> list[int]:
    """The answer without guesses, drawn and penalized."""
    swarm = Swarm(directory)
    swarm.add("whole", 0, 4)
    tokens = answer(swarm, SAMPLED)
    swarm.close()
    return tokens


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_guesses_go_round_the_ring_and_change_nothing(directory: Path, plain: list[int], right: int) -> None:
    swarm = Swarm(directory, guess=knowing(plain, right=right))
    for name, start, end in (("a", 0, 1), ("b", 1, 3), ("c", 3, 4)):
        swarm.add(name, start, end)
    with Session(swarm.transport, "") as session:
        tokens = list(session.generate(PROMPT, SAMPLED, timeout=TIMEOUT))
    steps = swarm.servers["c"].counters.ring_steps
    swarm.close()
    assert [token.token_id for token in tokens] == plain
    assert [token.position for token in tokens] == list(range(len(PROMPT), len(PROMPT) + 30))
    assert steps == len(range(1, 30, right + 1))


@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize("moment", [1, 16, 17, 18])
@pytest.mark.parametrize("right", [1, 3])
def test_an_answer_with_guesses_survives_a_kill(directory: Path, plain: list[int], victim: str, moment: int, right: int) -> None:
    swarm = Swarm(directory, guess=knowing(plain, right=right))
    for name, start, end in (("a", 0, 1), ("b", 1, 3), ("c", 3, 4)):
        swarm.add(name, start, end)
        swarm.add(f"{name}2", start, end, throughput=10)
    tokens = answer(swarm, SAMPLED, at={moment: lambda: swarm.kill(victim)})
    swarm.close()
    assert tokens == plain


@pytest.mark.parametrize("way", [("a", "b"), ("b", "c"), ("c", "a")])
def test_a_lost_step_with_guesses_is_asked_for_again(directory: Path, plain: list[int], way: tuple[str, str]) -> None:
    swarm = Swarm(directory, guess=knowing(plain, right=1))
    for name, start, end in (("a", 0, 1), ("b", 1, 3), ("c", 3, 4)):
        swarm.add(name, start, end)
    tokens = answer(swarm, SAMPLED, at={6: lambda: swarm.hub.drop_next(*way)})
    faults, replays = swarm.transport.counters.faults, swarm.transport.counters.replays
    swarm.close()
    assert (tokens, faults, replays) == (plain, 0, 1)


def test_timings_come_once_for_each_step(directory: Path, plain: list[int]) -> None:
    swarm = Swarm(directory, guess=knowing(plain, right=3))
    for name, start, end in (("a", 0, 2), ("b", 2, 4)):
        swarm.add(name, start, end)
    swarm.transport.timed = True
    with Session(swarm.transport, "") as session:
        tokens = list(session.generate(PROMPT, SAMPLED, timeout=TIMEOUT))
    steps = swarm.servers["b"].counters.ring_steps + 1
    swarm.close()
    assert sum(bool(token.timings) for token in tokens) == steps < 30
