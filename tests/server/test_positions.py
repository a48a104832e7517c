"""The rule of positions, whatever becomes of a message or two: see `tests.server.positions`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from corolla.client.session import Session
from corolla.errors import NetworkError
from corolla.messages import Hop, StepFrame, WireMessage
from corolla.models.reference import Reference
from corolla.types import GenerationSettings
from tests.models import tiny
from tests.server.positions import Servers, guess_badly, servers
from tests.server.ring import PROMPT, SETTINGS, TIMEOUT, Swarm, answer


@pytest.fixture(scope="module")
def running() -> Iterator[Servers]:
    with servers() as running:
        yield running


@pytest.mark.parametrize("seed", range(16))
def test_no_fault_of_a_message_or_two_bends_an_answer(running: Servers, seed: int) -> None:
    running.run(seed)


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    swarm = Swarm(tiny.save("llama", tmp_path), guess_badly)
    for name, start, end in (("a", 0, 1), ("b", 1, 3), ("c", 3, 4)):
        swarm.add(name, start, end)
    yield swarm
    swarm.close()


def test_a_step_that_comes_again_leaves_no_wrong_guess_behind(swarm: Swarm, tmp_path: Path) -> None:
    """With the guesses of an earlier step in its cache, a server would go on from them."""
    came: list[StepFrame] = []

    def repeat(sender: str, receiver: str, message: WireMessage) -> list[tuple[float, WireMessage]]:
        if receiver != "b" or not isinstance(message, StepFrame) or message.route:
            return [(0.0, message)]
        came.append(message)
        return [(0.0, came[-3]), (0.0, message)] if len(came) == 10 else [(0.0, message)]

    swarm.hub.intercept = repeat
    assert answer(swarm) == Reference(tmp_path).greedy(PROMPT, 30)
    assert swarm.servers["b"].counters.stale == 1
    assert swarm.transport.counters.replays == 0


def test_marks_of_guesses_that_were_stripped_are_their_senders_fault(swarm: Swarm, tmp_path: Path) -> None:
    def strip(sender: str, receiver: str, message: WireMessage) -> list[tuple[float, WireMessage]]:
        if (sender, receiver) == ("b", "c") and isinstance(message, StepFrame) and message.drafts:
            message = msgspec.structs.replace(message, drafts=0)
        return [(0.0, message)]

    swarm.add("b-spare", 1, 3, throughput=1.0)
    swarm.hub.intercept = strip
    assert answer(swarm) == Reference(tmp_path).greedy(PROMPT, 30)
    assert swarm.transport.bans.banned() == {"b"}


def test_a_lost_part_of_a_prompt_bans_nobody(swarm: Swarm, tmp_path: Path) -> None:
    """The server behind tells of a gap, in the middle of the step: it is honest."""
    parts: list[StepFrame] = []

    def lose(sender: str, receiver: str, message: WireMessage) -> list[tuple[float, WireMessage]]:
        if (sender, receiver) == ("b", "c") and isinstance(message, StepFrame):
            parts.append(message)
            if len(parts) == 2:
                return []
        return [(0.0, message)]

    prompt = PROMPT * 2
    swarm.hub.intercept = lose
    with Session(swarm.transport, "") as session:
        tokens = [token.token_id for token in session.generate(prompt, SETTINGS, timeout=TIMEOUT)]
    assert tokens == Reference(tmp_path).greedy(prompt, 30)
    assert parts[1].start > 0
    assert swarm.transport.counters.faults == 0
    assert swarm.transport.bans.banned() == set()


def test_a_generation_keeps_the_beginning_that_its_first_step_names(swarm: Swarm, tmp_path: Path) -> None:
    """A client that names another with its second step ends no engine."""
    route = (Hop("a", 0, 1), Hop("nobody", 1, 4))
    mallory = swarm.hub.join("mallory")
    mallory.listen(lambda sender, message: None, lambda peer: None)
    mallory.send("a", StepFrame("x", 1, 0, (101, 102), route=route, client="mallory", began=0))
    mallory.send("a", StepFrame("x", 1, 2, (103,) * 11, route=route, client="mallory", more=True))
    assert answer(swarm) == Reference(tmp_path).greedy(PROMPT, 30)
    assert swarm.engines["a"].healthy


def test_a_chunk_that_got_lost_after_a_rollback_bans_nobody(swarm: Swarm, tmp_path: Path) -> None:
    lost: list[StepFrame] = []

    def lose(sender: str, receiver: str, message: WireMessage) -> list[tuple[float, WireMessage]]:
        first = isinstance(message, StepFrame) and message.generation > 1 and message.more
        if (sender, receiver) == ("a", "b") and first and not lost:
            lost.append(message)  # type: ignore[arg-type]
            return []
        return [(0.0, message)]

    reference = Reference(tmp_path)
    with Session(swarm.transport, "") as session:
        list(session.generate([*PROMPT, *PROMPT], SETTINGS, timeout=TIMEOUT))
        session.rollback(20)
        swarm.hub.intercept = lose
        edited = [7 + i * 29 % 170 for i in range(150)]
        tokens = [token.token_id for token in session.generate(edited, SETTINGS, timeout=TIMEOUT)]
    assert lost
    assert tokens == reference.greedy([*PROMPT[:20], *edited], 30)
    assert not swarm.transport.bans.banned()


def test_sessions_of_a_client_that_died_are_forgotten_in_the_middle_of_the_route_too(swarm: Swarm) -> None:
    session = Session(swarm.transport, "")
    tokens = session.generate(PROMPT, GenerationSettings(max_tokens_to_generate=300), timeout=TIMEOUT)
    for _ in range(3):
        next(tokens)
    swarm.hub.kill("client")  # which never had a connection to b
    deadline = time.monotonic() + TIMEOUT
    while any(server.sessions for server in swarm.servers.values()) or any(e.gauges["pages_held"] for e in swarm.engines.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with suppress(NetworkError):
        tokens.close()


def test_a_cancelled_answer_is_dead_on_every_server(swarm: Swarm) -> None:
    """Links of 15 ms: some of its steps are always on their way."""
    swarm.hub.intercept = lambda sender, receiver, message: [(0.015, message)]
    with Session(swarm.transport, "") as session:
        for _ in range(3):
            tokens = session.generate(PROMPT[:7], GenerationSettings(max_tokens_to_generate=300), timeout=TIMEOUT)
            for _ in range(4):
                next(tokens)
            tokens.close()
            deadline = time.monotonic() + TIMEOUT
            sampled, settled = -1, time.monotonic()
            while time.monotonic() < settled + 0.2:  # several times round the ring without another token
                assert time.monotonic() < deadline, "the answer goes on"
                if swarm.engines["c"].counters.sampled != sampled:
                    sampled, settled = swarm.engines["c"].counters.sampled, time.monotonic()
                time.sleep(0.01)
            assert not any(engine.active for engine in swarm.engines.values())
