"""Hostile clients among honest ones: they get typed errors, and nobody else notices.

Bytes that are no frame hardly come this far: see test_p2p.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from corolla.client.session import Session
from corolla.engine.engine import EngineConfig
from corolla.errors import CallerError
from corolla.messages import Close, ForwardFrame, Hop, HopTiming, SettingsFrame, StepFrame, Token, WireMessage
from corolla.models.reference import Reference
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm import frames
from corolla.swarm.arrays import to_array
from tests.models import tiny
from tests.swarm.hostile import (
    BEHIND,
    BIG,
    CONFIG,
    COUNT,
    GREEDY,
    HIDDEN,
    PATIENCE,
    PROMPT,
    ROWS,
    Mallory,
    Swarm,
    answer,
    eventually,
    named,
    rows,
    step,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def swarm(directory: Path) -> Iterator[Swarm]:
    swarm = Swarm(directory)
    yield swarm
    swarm.close()


@pytest.fixture
def whole(swarm: Swarm) -> SpanServer:
    return swarm.add("s", 0, 4)


FROM_CLIENTS: dict[str, tuple[WireMessage, str]] = {
    "NaN": (step(**rows(float("nan")), output="hidden"), "InvalidSetting"),
    "infinity": (step(**rows(float("inf")), output="hidden"), "InvalidSetting"),
    "finite, and too large, wanting rows": (step(**rows(3e38), output="hidden", settings=None), ""),
    "finite, and too large, wanting tokens": (step(**rows(3e38), route=BEHIND, hop=1), ""),
    "rows too wide": (step(**rows(0.0, 2 * HIDDEN), output="hidden"), "InvalidSetting"),
    "NaN as a server": (step(**rows(float("nan")), route=BEHIND, hop=1), "ServerFault"),
    "tokens as a server": (step(route=BEHIND, hop=1), ""),
    "tokens below the vocabulary": (step(tokens=(-BIG, 1)), "InvalidSetting"),
    "tokens above the vocabulary": (step(tokens=(BIG, 1)), "InvalidSetting"),
    "tokens below the vocabulary, as a server": (
        step(**rows(0.0), route=BEHIND, hop=1, tokens=(-BIG, 1), settings=SettingsFrame(repetition_penalty=1.5)),
        "",
    ),
    "a position out of nowhere": (step(start=BIG), "PromptTooLong"),
    "nothing to compute": (step(tokens=()), "EmptyPrompt"),
    "blocks of nobody": (step(route=(Hop("s", 0, 400),)), "InvalidSetting"),
    "settings out of range": (step(settings=SettingsFrame(temperature=-1.0)), "InvalidSetting"),
    "a hop of somebody else": (step(route=(Hop("t", 0, 4),)), "Unauthorized"),
    "a server before that it is not": (step(route=(Hop("t", 0, 1), Hop("s", 1, 4)), hop=1, **rows(0.0)), "Unauthorized"),
    "no route": (step(route=()), "ServerFault"),
    "the same server again and again": (step(route=tuple(Hop("s", i, i + 1) for i in range(4))), "InvalidSetting"),
    "a call of NaN": (
        ForwardFrame(1, 0, 4, (2,), to_array(torch.full((2, HIDDEN), float("nan")), "float32")),
        "InvalidSetting",
    ),
    "a call of wide rows": (ForwardFrame(1, 0, 4, (2,), to_array(torch.zeros(2, 3 * HIDDEN), "float32")), "InvalidSetting"),
    "a call of other blocks": (ForwardFrame(1, 3, 9, (2,), ROWS), "InvalidSetting"),
}


@pytest.mark.parametrize("case", named(FROM_CLIENTS))
def test_a_hostile_client_gets_a_typed_error_and_the_others_their_answers(
    swarm: Swarm, whole: SpanServer, directory: Path, case: tuple[WireMessage, str]
) -> None:
    message, kind = case
    honest = swarm.client("honest")
    mallory = Mallory(swarm.hub)
    with Session(honest, "") as session:
        tokens = session.generate(PROMPT, GREEDY, timeout=PATIENCE)
        first = next(tokens).token_id
        mallory.send(message)
        if kind:
            eventually(lambda: mallory.failures[:1] == [kind])
        assert [first, *(token.token_id for token in tokens)] == Reference(directory).greedy(PROMPT, COUNT)
    assert not honest.bans.banned()
    assert honest.counters.replays == 0
    swarm.hub.kill("mallory")
    swarm.check_integrity()


def test_a_header_that_grows_on_its_way_ends_no_server(swarm: Swarm, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It fits a frame as it comes, and no longer with what the server adds to it."""
    swarm.add("s", 0, 2)
    swarm.add("t", 2, 4)
    mallory = Mallory(swarm.hub)

    def longest(characters: int) -> StepFrame:
        timings = tuple(HopTiming("x" * ((characters + i) // 255), 0.0, 0.0, 0.0) for i in range(255))
        return step(route=(Hop("s", 0, 2), Hop("t", 2, 4)), timed=True, timings=timings)

    with caplog.at_level(logging.INFO):
        mallory.send(longest(next(n for n in range(2**16, 0, -1) if _fits(longest(n)))))
        eventually(lambda: "a message was not sent" in caplog.text)
    assert answer(swarm.client("honest")) == Reference(directory).greedy(PROMPT, COUNT)
    swarm.hub.kill("mallory")
    swarm.check_integrity()


def _fits(message: WireMessage) -> bool:
    try:
        frames.encode(message)
    except CallerError:
        return False
    return True


def test_rows_that_do_not_fit_the_wire_end_no_server(swarm: Swarm, directory: Path) -> None:
    swarm.add("s", 0, 4, config=SpanServerConfig(wire_dtype="float16"))
    mallory = Mallory(swarm.hub)
    mallory.send(step(**rows(1e30), output="hidden", settings=None))
    eventually(lambda: mallory.failures == ["ServerFault"])
    assert answer(swarm.client("honest")) == Reference(directory).greedy(PROMPT, COUNT)
    swarm.check_integrity()


def test_sessions_of_others_are_out_of_reach(swarm: Swarm, whole: SpanServer, directory: Path) -> None:
    honest, mallory = swarm.client("honest"), Mallory(swarm.hub)
    with Session(honest, "") as session:
        tokens = session.generate(PROMPT, GREEDY, timeout=PATIENCE)
        first = next(tokens).token_id
        name = session.name
        mallory.send(
            Close(name),
            step(session=name, generation=BIG),
            step(session=name, generation=BIG, client="honest"),
            step(session=name, generation=1, route=(), start=3),
        )
        assert [first, *(token.token_id for token in tokens)] == Reference(directory).greedy(PROMPT, COUNT)
    assert mallory.failures
    assert honest.counters.replays == 0


def test_sessions_of_clients_that_nobody_knows_do_not_stay(swarm: Swarm, whole: SpanServer, directory: Path) -> None:
    mallory = Mallory(swarm.hub)
    route = (Hop("mallory", 0, 1), Hop("s", 1, 4), *(Hop("x" * 200, i, i + 1) for i in range(4, 200)))
    for batch in range(5):
        mallory.send(
            *(step(session=f"m{batch}.{i}", route=route, hop=1, client=f"c{batch}.{i}", **rows(0.0), settings=None) for i in range(100))
        )
    assert answer(swarm.client("honest")) == Reference(directory).greedy(PROMPT, COUNT)
    eventually(lambda: whole.sessions < 10)
    swarm.check_integrity()


def test_sessions_that_wait_for_their_server_before_take_no_places(swarm: Swarm, directory: Path) -> None:
    """A head has answered one token of each, and the rows of the next never come."""
    places = EngineConfig().max_active
    swarm.add("s", 0, 4, cache=16 * (places + 10))
    mallory = Mallory(swarm.hub)
    mallory.send(*(step(session=f"m{i}", route=BEHIND, hop=1, **rows(0.0)) for i in range(places)))
    eventually(lambda: sum(isinstance(message, Token) for message in mallory.heard) == places)
    assert answer(swarm.client("honest")) == Reference(directory).greedy(PROMPT, COUNT)
    swarm.hub.kill("mallory")
    swarm.check_integrity()


def test_sessions_in_anothers_name_take_nothing_from_them(swarm: Swarm, directory: Path) -> None:
    server = swarm.add("s", 0, 4, config=replace(CONFIG, sessions_per_client=16))
    honest, mallory = swarm.client("honest"), Mallory(swarm.hub)
    mallory.send(*(step(session=f"m{i}", route=BEHIND, hop=1, client="honest", **rows(0.0), settings=None) for i in range(20)))
    assert server.sessions <= 16
    with Session(honest, "") as session:
        tokens = [token.token_id for token in session.generate(PROMPT, GREEDY, timeout=2.0)]
    assert tokens == Reference(directory).greedy(PROMPT, COUNT)
    eventually(lambda: server.sessions == 0)  # who knows nothing of them ends them
