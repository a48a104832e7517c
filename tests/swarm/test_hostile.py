"""Hostile servers among honest ones, in the middle of answers: what they pass on to other servers is gone around."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.wire import Array, StepFrame, WireMessage
from tests.models import tiny
from tests.swarm.hostile import BIG, PATIENCE, PENALIZED, PROMPT, Alter, Swarm, answer, named


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
