"""Servers that lie, stall, flood or are full, and messages that are lost after a rollback: every row stays right."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corolla.barrier import unexpected
from corolla.errors import Busy, CorollaError, InvalidSetting, NoRoute, StorageError, Unauthorized
from corolla.messages import Ask, ForwardFrame, Gap, HiddenFrame, Pong, ResultFrame, StepFrame, Whereabouts, WireMessage
from corolla.remote.incoming import Fault
from corolla.remote.mailbox import Mailbox, open_mailbox
from corolla.swarm.arrays import to_array
from corolla.swarm.convert import failed_of
from corolla.types import Span
from tests.remote.conftest import MakeSwarm
from tests.remote.swarm import Local
from tests.remote.test_session import assert_close, inputs, opened, whole

TWO = {"a": (0, 4), "b": (0, 4)}


@pytest.fixture
def llama(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


def answering(local: Local, answer: Callable[[StepFrame], WireMessage | None], peer: str = "a") -> list[StepFrame]:
    """From now on `peer` answers steps with this, and computes nothing. Returns the steps, as they come."""
    came: list[StepFrame] = []

    def before(receiver: str, message: WireMessage) -> WireMessage | None:
        if receiver != peer or not isinstance(message, (StepFrame, Ask)):
            return message
        if isinstance(message, StepFrame):
            came.append(message)
        if came and (said := answer(came[-1])) is not None:
            local.hub.carry(peer, "client", said)
        return None

    local.before = before
    return came


def test_a_full_server_is_gone_around_at_once(make_swarm: MakeSwarm, llama: Path) -> None:
    local, hidden = make_swarm(llama, TWO), inputs(1)
    asked = answering(local, lambda step: failed_of(Busy(600.0), step.session, step.generation, peer="a"))
    began = time.monotonic()
    with opened(local) as session:
        assert_close(session.step(hidden), whole(llama, hidden))
    assert time.monotonic() - began < 5
    assert len(asked) == 1
    assert not local.servers.bans.banned()


def test_a_server_that_is_always_full_is_not_asked_without_a_rest(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, {"a": (0, 4)}, request_timeout=1.0)
    asked = answering(local, lambda step: failed_of(Busy(0.0), step.session, step.generation, peer="a"))
    with opened(local) as session, pytest.raises(Busy):
        session.step(inputs(1))
    assert len(asked) <= 5


@pytest.mark.parametrize("error", [StorageError("disk"), Unauthorized("no"), NoRoute((Span(0, 1),)), CorollaError("x")])
def test_an_error_that_no_server_raises_is_the_servers_fault(make_swarm: MakeSwarm, llama: Path, error: CorollaError) -> None:
    local, hidden = make_swarm(llama, TWO), inputs(1)
    answering(local, lambda step: failed_of(error, step.session, step.generation, peer="a"))
    with opened(local) as session:
        assert_close(session.step(hidden), whole(llama, hidden))
    assert local.servers.bans.banned() == {"a"}


def test_an_error_that_blames_the_caller_is_tried_at_another_route(make_swarm: MakeSwarm, llama: Path) -> None:
    local, hidden = make_swarm(llama, TWO), inputs(1)
    asked = answering(local, lambda step: failed_of(InvalidSetting("hidden", "no"), step.session, step.generation, peer="a"))
    with opened(local) as session:
        assert_close(session.step(hidden), whole(llama, hidden))
    assert len(asked) == 1


def test_what_a_server_says_is_shown_as_one_line(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, {"a": (0, 4)})
    error = InvalidSetting("hidden", "\x1b[2Jno\nERROR: " + "x" * 3000)
    answering(local, lambda step: failed_of(error, step.session, step.generation, peer="a"))
    with opened(local) as session, pytest.raises(InvalidSetting) as raised:
        session.step(inputs(1))
    said = str(raised.value)
    assert said.startswith("a server said: ")
    assert len(said) < 500
    assert said.isprintable()


def rows(step: StepFrame, **changes: object) -> HiddenFrame:
    assert step.hidden is not None
    values = {"session": step.session, "generation": step.generation, "start": step.start, "hidden": step.hidden, **changes}
    return HiddenFrame(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer",
    [
        lambda step: rows(step, hidden=to_array(torch.full((54, 64), float("nan")), "float32")),
        lambda step: rows(step, hidden=to_array(torch.zeros(55, 64), "float32")),
        lambda step: rows(step, hidden=to_array(torch.zeros(54, 63), "float32")),
        lambda step: rows(step, start=step.start + 1),
        lambda step: ResultFrame(1, step.hidden),  # of a call that there is not
        lambda step: Gap(step.session, step.generation, step.start + 54),
        lambda step: Gap(step.session, step.generation, step.start),
        lambda step: None,
        lambda step: Whereabouts(step.session, step.generation, 0, 54),  # it works, it says
    ],
    ids=["not finite", "more rows", "narrower", "elsewhere", "a call's", "has all that it was asked", "always lost", "silent", "pending"],
)
def test_a_server_that_answers_what_cannot_be_is_left(
    make_swarm: MakeSwarm, llama: Path, answer: Callable[[StepFrame], WireMessage | None]
) -> None:
    local, hidden = make_swarm(llama, TWO, request_timeout=3.0, silence=0.1, lost=0.2), inputs(1)
    answering(local, answer)
    with opened(local) as session:
        assert_close(session.step(hidden), whole(llama, hidden))
    assert local.servers.bans.banned() == {"a"}


def test_a_server_whose_engine_is_dead_is_left_at_once(make_swarm: MakeSwarm, llama: Path) -> None:
    local, hidden = make_swarm(llama, TWO), inputs(1)
    answering(local, lambda step: Pong(1, failing=True))
    with opened(local) as session:
        assert_close(session.step(hidden), whole(llama, hidden))
    assert local.servers.bans.banned() == {"a"}


def test_a_flood_is_bounded_and_the_fault_of_its_sender(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, TWO)
    mailbox = Mailbox(local.servers)
    mailbox.open_to(["a", "b"], 54 * 64 * 4)
    piece = to_array(torch.zeros(54, 64), "float32")
    for _ in range(5000):
        mailbox.put("a", HiddenFrame("s", 1, 0, piece))
        mailbox.put("b", Gap("s", 1, 0))
        mailbox.put("stranger", HiddenFrame("s", 1, 0, piece))
    assert mailbox.waiting < 600
    with pytest.raises(Fault, match="more than it was asked for"):
        list(iter(lambda: mailbox.wait(["a", "b"], 1, "s"), None))


def test_calls_go_around_a_full_server_too(make_swarm: MakeSwarm, llama: Path) -> None:
    local, hidden = make_swarm(llama, TWO), inputs(1)

    def before(peer: str, message: WireMessage) -> WireMessage | None:
        if peer == "a" and isinstance(message, ForwardFrame):
            local.hub.carry(peer, "client", failed_of(Busy(600.0), str(message.call), 0, peer=peer))
            return None
        return message

    local.before = before
    began = time.monotonic()
    out, _ = local.calls.forward(Span(0, 4), (hidden.shape[1],), hidden[0])
    assert_close(out[None], whole(llama, hidden))
    assert time.monotonic() - began < 5


def test_an_error_that_nobody_expected_on_the_networks_thread_is_counted_and_ends_nothing(make_swarm: MakeSwarm, llama: Path) -> None:
    local, hidden = make_swarm(llama, {"a": (0, 4)}), inputs(1)
    before = unexpected["a message for the PyTorch client"]
    with open_mailbox(local.servers, "1") as mailbox:
        mailbox.open_to(["a"], 9)
        local.servers._receive("a", ResultFrame(1, None))  # type: ignore[arg-type]
    assert unexpected["a message for the PyTorch client"] == before + 1
    with opened(local) as session:
        assert_close(session.step(hidden), whole(llama, hidden))


@pytest.mark.parametrize("nth", [0, 1])
@pytest.mark.parametrize("fate", ["lost", "refused"])
def test_chunks_after_a_rollback_that_get_lost_leave_no_older_row(make_swarm: MakeSwarm, llama: Path, nth: int, fate: str) -> None:
    local = make_swarm(llama, {"a": (0, 2), "b": (2, 4)}, silence=0.1, lost=0.3)
    hidden, other = inputs(1, 70), torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(9))
    expected = whole(llama, torch.cat([hidden[:, :10], other], 1))[:, 10:]
    with opened(local) as session:
        session.step(hidden)
        session.position = 10
        left = [nth]

        def intercept(sender: str, receiver: str, message: WireMessage) -> list[tuple[float, WireMessage]]:
            if (sender, receiver) == ("a", "b") and isinstance(message, StepFrame):
                left[0] -= 1
                if left[0] == -1:
                    if fate == "refused":
                        local.hub.carry("b", "client", failed_of(Busy(0.1), message.session, message.generation, peer="b"))
                    return []
            return [(0.0, message)]

        local.hub.intercept = intercept
        assert_close(session.step(other), expected)
    assert left[0] < 0
    assert not local.servers.bans.banned()
