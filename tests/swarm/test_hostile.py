"""Hostile servers among honest ones, in the middle of answers: what they pass on to other servers is gone around."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from corolla.messages import Array, StepFrame, WireMessage
from corolla.models.reference import Reference
from corolla.swarm.arrays import from_array, to_array
from tests.models import tiny
from tests.swarm.hostile import BIG, COUNT, PATIENCE, PENALIZED, PROMPT, Alter, Swarm, answer, named


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def swarm(directory: Path) -> Iterator[Swarm]:
    swarm = Swarm(directory)
    yield swarm
    swarm.close()


def with_array(change: Callable[[Array], Array]) -> Alter:
    def alter(message: WireMessage) -> WireMessage:
        if not isinstance(message, StepFrame) or message.hidden is None or message.start < len(PROMPT):
            return message
        return msgspec.structs.replace(message, hidden=change(message.hidden))

    return alter


def with_rows(change: Callable[[torch.Tensor], torch.Tensor]) -> Alter:
    return with_array(lambda array: to_array(change(from_array(array)), "float32"))


def with_fields(**fields: Any) -> Alter:
    def alter(message: WireMessage) -> WireMessage:
        if not isinstance(message, StepFrame) or message.hidden is None or message.start < len(PROMPT):
            return message
        return msgspec.structs.replace(message, **fields)

    return alter


TO_SERVERS = {
    "NaN": with_rows(lambda rows: rows * float("nan")),
    "infinity": with_rows(lambda rows: rows + float("inf")),
    "rows too wide": with_rows(lambda rows: rows.repeat(1, 2)),
    "rows too narrow": with_rows(lambda rows: rows[:, :-1]),
    "another dtype": with_array(lambda array: Array("bfloat16", (array.shape[0], 2 * array.shape[1]), array.data)),
    "no rows": with_fields(hidden=None),
    "a token far below the vocabulary": with_fields(tokens=(-BIG,)),
    "a token far above it": with_fields(tokens=(BIG,)),
    "rows at a position out of nowhere": with_fields(start=BIG),
    "rows at a position ahead": with_fields(start=len(PROMPT) + 100),
    "another generation": with_fields(generation=BIG),
}


@pytest.mark.parametrize("alter", named(TO_SERVERS))
def test_what_a_hostile_server_passes_on_is_gone_around(swarm: Swarm, directory: Path, alter: Alter) -> None:
    swarm.add("a", 0, 1)
    swarm.add("b", 1, 3, alter=alter)
    swarm.add("c", 3, 4)
    swarm.add("b2", 1, 3, throughput=1.0)
    honest, bystander = swarm.client("honest"), swarm.client("bystander")
    bystander.bans.blame("b")  # a session that shares servers a and c, and has nothing to do with b
    theirs: list[list[int]] = []
    beside = threading.Thread(target=lambda: theirs.append(answer(bystander, PENALIZED)))
    beside.start()
    ours = answer(honest, PENALIZED)
    beside.join(PATIENCE)
    assert swarm.altered["b"]
    assert [ours] == theirs
    assert honest.bans.banned() == {"b"}
    swarm.check_integrity()


def test_guesses_whose_mark_is_taken_off_are_the_fault_of_the_server_that_did_it(swarm: Swarm, directory: Path) -> None:
    def unmark(message: WireMessage) -> WireMessage:
        return msgspec.structs.replace(message, drafts=0) if isinstance(message, StepFrame) and message.drafts else message

    swarm.guess = lambda history, token, most: (token,) * most
    swarm.add("a", 0, 1)
    swarm.add("b", 1, 3, alter=unmark)
    swarm.add("c", 3, 4)
    swarm.add("b2", 1, 3, throughput=1.0)
    honest = swarm.client("honest")
    assert answer(honest) == Reference(directory).greedy(PROMPT, COUNT)
    assert swarm.altered["b"]
    assert honest.bans.banned() == {"b"}


@pytest.mark.parametrize("later", [False, True], ids=["the first", "a later one"])
def test_a_chunk_that_is_kept_back_bans_nobody_honest(swarm: Swarm, directory: Path, later: bool) -> None:
    """The server behind it tells of a gap again and again, or gets nothing more."""
    prompt = [5 + i * 11 % 180 for i in range(250)]

    def keep_back(message: WireMessage) -> WireMessage | list[WireMessage]:
        chunk = isinstance(message, StepFrame) and message.hidden is not None and len(message.tokens) > 1
        return [] if chunk and (message.start > 0) == later else message

    for name, start, end, throughput in (("a", 0, 1, 100.0), ("a2", 0, 1, 1.0), ("b", 1, 4, 100.0), ("b2", 1, 4, 1.0)):
        swarm.add(name, start, end, throughput)
    swarm.alters["a"] = keep_back
    honest = swarm.client("honest", answer=0.4, lost=0.4)
    assert answer(honest, prompt=prompt) == Reference(directory).greedy(prompt, COUNT)
    assert swarm.altered["a"]
    assert not honest.bans.banned() - {"a"}
