"""Sessions on hidden states: many steps are one long input, whatever is undone, lost or killed in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corolla.engine.calls import CallSequences, forward
from corolla.errors import Busy, InvalidSetting, NoRoute, PromptTooLong
from corolla.messages import PromptFrame, StepFrame, WireMessage
from corolla.models.span import load_span
from corolla.remote.sequential import RemoteSequential
from corolla.remote.session import InferenceSession
from corolla.swarm.convert import failed_of
from corolla.types import Span
from tests.engine.stock import finish
from tests.remote.conftest import MakeSwarm
from tests.remote.swarm import Local, killing

WHOLE = Span(0, 4)
SERVERS = {"a": (0, 1), "b": (1, 3), "c": (3, 4)}
SPARE = {"a": (0, 2), "b": (2, 4), "c": (0, 1), "d": (1, 3), "e": (3, 4)}
TURNS = (5, 40, 1, 1, 7)


def inputs(sequences: int = 2, columns: int = sum(TURNS)) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(sequences, columns, 64)


def whole(directory: Path, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
    """All columns at once, in one process."""
    lengths = (hidden.shape[1],) * len(hidden)
    out = finish(forward(load_span(directory, dtype="float32"), CallSequences(WHOLE, lengths, hidden.flatten(0, 1), prompts)))
    return out.view_as(hidden)


def opened(local: Local, max_length: int = 100, prompts: torch.Tensor | None = None) -> InferenceSession:
    return RemoteSequential(local.calls, WHOLE).inference_session(max_length=max_length, prompts=prompts)


def in_turns(session: InferenceSession, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([session.step(piece) for piece in hidden.split(TURNS, 1)], 1)


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("servers", [{"a": (0, 4)}, {"a": (0, 2), "b": (2, 4)}, SERVERS])
def test_five_turns_are_one_long_input(make_swarm: MakeSwarm, directory: Path, servers: dict[str, tuple[int, int]]) -> None:
    hidden = inputs()
    with opened(make_swarm(directory, servers)) as session:
        assert_close(in_turns(session, hidden), whole(directory, hidden))
        assert session.position == sum(TURNS)


@pytest.mark.parametrize("nth", [1, 2, 7])
@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_servers_death_changes_no_row(make_swarm: MakeSwarm, directory: Path, victim: str, nth: int) -> None:
    local, hidden = make_swarm(directory, SPARE), inputs()
    steps = [0]

    def before(peer: str, message: WireMessage) -> WireMessage:
        steps[0] += isinstance(message, StepFrame)
        if steps[0] == nth:
            local.hub.kill(victim)
        return message

    local.before = before
    with opened(local) as session:
        assert_close(in_turns(session, hidden), whole(directory, hidden))
    assert victim in local.servers.bans.banned()


def test_a_server_that_hangs_is_given_up(make_swarm: MakeSwarm, checkpoints: dict[str, Path]) -> None:
    local, hidden = make_swarm(checkpoints["llama"], SPARE, silence=0.2, answer=2.0), inputs()
    with opened(local) as session:
        session.step(hidden[:, :9])
        local.hub.freeze("b")
        assert_close(session.step(hidden[:, 9:]), whole(checkpoints["llama"], hidden)[:, 9:])


def test_going_back_is_setting_the_position(make_swarm: MakeSwarm, directory: Path) -> None:
    hidden = inputs()
    with opened(make_swarm(directory, SERVERS)) as session:
        session.step(hidden)
        session.position = 20
        other = torch.cat([hidden[:, :20], inputs(columns=30)], 1)
        assert_close(session.step(other[:, 20:]), whole(directory, other)[:, 20:])
        session.position = 0
        assert_close(session.step(hidden), whole(directory, hidden))
        for position in (-1, session.position + 1):
            with pytest.raises(InvalidSetting, match="position"):
                session.position = position


def test_left_padding_counts_no_positions(make_swarm: MakeSwarm, directory: Path) -> None:
    hidden = inputs(3, 12)
    mask = torch.ones(3, 12)
    mask[0, :4] = mask[2, :9] = 0
    with opened(make_swarm(directory, SERVERS)) as session:
        out = torch.cat([session.step(hidden[:, :8], mask[:, :8]), session.step(hidden[:, 8:], mask[:, 8:])], 1)
        for row, padding in enumerate((4, 0, 9)):
            assert_close(out[row, padding:], whole(directory, hidden[row : row + 1, padding:])[0])
            assert not out[row, :padding].any()
        session.position = 6
        assert_close(session.step(hidden[:, 6:], mask[:, 6:])[0], whole(directory, hidden[:1, 4:])[0, 2:])


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 0], [2, 2, 1], [1, 1, 2, 2, 0]])
def test_beams_are_reordered(make_swarm: MakeSwarm, directory: Path, order: list[int]) -> None:
    hidden = inputs(3, 12)
    hidden[:, :6] = hidden[:1, :6]
    local = make_swarm(directory, SERVERS)
    sent = [0]

    def before(peer: str, message: WireMessage) -> WireMessage:
        sent[0] += message.hidden.shape[0] if isinstance(message, StepFrame) and message.hidden is not None else 0
        return message

    with opened(local) as session:
        session.step(hidden)
        session.reorder(order)
        more = inputs(len(order), 2)
        local.before = before
        expected = whole(directory, torch.cat([hidden[order], more], 1))
        assert_close(session.step(more), expected[:, 12:])
        again = len(order) - len(set(order))
        fresh = max(0, len(order) - 3)
        assert sent[0] == 2 * len(order) + 6 * again + 6 * fresh
        with pytest.raises(InvalidSetting, match="indices"):
            session.reorder([0, len(order)])


def test_deep_prompts_are_in_every_step(make_swarm: MakeSwarm, directory: Path) -> None:
    hidden, prompts = inputs(), torch.randn(4, 3, 64)
    local = make_swarm(directory, SERVERS)
    rows, given = counted(local)
    with opened(local, prompts=prompts) as session:
        assert_close(in_turns(session, hidden), whole(directory, hidden, prompts))
    assert rows == [sum(TURNS) * 2]  # servers keep the caches
    assert sorted(given) == ["a", "b", "c"]


def counted(local: Local) -> tuple[list[int], list[str]]:
    """Rows that go to the first server, and who is sent a soft prompt."""
    rows, given = [0], list[str]()

    def before(peer: str, message: WireMessage) -> WireMessage:
        if isinstance(message, StepFrame) and message.hidden is not None:
            rows[0] += message.hidden.shape[0]
        elif isinstance(message, PromptFrame):
            given.append(peer)
        return message

    local.before = before
    return rows, given


def test_a_recovery_replays_prompts_and_beams(make_swarm: MakeSwarm, directory: Path) -> None:
    hidden, prompts, order = inputs(3, 12), torch.randn(4, 3, 64), [2, 2, 1]
    local = make_swarm(directory, SPARE)
    with opened(local, prompts=prompts) as session:
        session.step(hidden)
        session.reorder(order)
        more = inputs(3, 2)
        local.hub.kill("b")
        expected = whole(directory, torch.cat([hidden[order], more], 1), prompts)
        assert_close(session.step(more), expected[:, 12:])
    assert local.servers.bans.banned() == {"b"}


def test_a_prompt_that_servers_lack_is_sent_again(make_swarm: MakeSwarm, directory: Path) -> None:
    hidden, prompts = inputs(), torch.randn(4, 3, 64)
    local, dropped = make_swarm(directory, SERVERS), list[str]()

    def before(peer: str, message: WireMessage) -> WireMessage | None:
        if isinstance(message, PromptFrame) and peer not in dropped:
            dropped.append(peer)
            return None
        return message

    local.before = before
    with opened(local, prompts=prompts) as session:
        assert_close(in_turns(session, hidden), whole(directory, hidden, prompts))
    assert dropped == ["a", "b", "c"]
    assert not local.servers.bans.banned()


def until(happened: Callable[[], bool]) -> None:
    """What another thread is to hear first."""
    deadline = time.monotonic() + 30.0
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_leaves_is_left_where_there_is_another(make_swarm: MakeSwarm, checkpoints: dict[str, Path]) -> None:
    directory, hidden = checkpoints["llama"], inputs()
    local = make_swarm(directory, {"a": (0, 4), "b": (0, 4)})
    with opened(local) as session:
        session.step(hidden[:, :5])
        for server, end in zip(local.spans, (20, 30), strict=True):  # to the second, and where it leaves too, nobody else can take it
            server.leave()
            until(lambda: bool(local.servers.peers.leaving))
            at = session.position
            assert_close(session.step(hidden[:, at:end]), whole(directory, hidden)[:, at:end])
            until(lambda: [server.sessions for server in local.spans] == [0, 2])
    assert not local.servers.bans.banned()


@pytest.mark.parametrize("end", [13, 54])  # in one message, and with another one behind it
def test_a_message_that_got_lost_between_servers_is_sent_again(make_swarm: MakeSwarm, checkpoints: dict[str, Path], end: int) -> None:
    directory, hidden = checkpoints["llama"], inputs(1)
    local = make_swarm(directory, {"a": (0, 2), "b": (2, 4)}, silence=0.1, lost=0.3)
    with opened(local) as session:
        session.step(hidden[:, :5])
        local.hub.drop_next("a", "b")
        assert_close(session.step(hidden[:, 5:end]), whole(directory, hidden)[:, 5:end])
    assert not local.servers.bans.banned()


def test_sessions_that_drive_one_another_out_go_on(make_swarm: MakeSwarm, checkpoints: dict[str, Path]) -> None:
    directory, hidden = checkpoints["llama"], inputs(4)
    local = make_swarm(directory, {"a": (0, 2), "b": (2, 4)}, cache_tokens=112)
    sessions = [opened(local) for _ in hidden]
    out = [[], [], [], []]  # type: list[list[torch.Tensor]]
    for piece in hidden.split(TURNS, 1):
        for row, session in enumerate(sessions):
            out[row].append(session.step(piece[row : row + 1]))
    assert_close(torch.cat([torch.cat(pieces, 1) for pieces in out]), whole(directory, hidden))
    assert not local.servers.bans.banned()


def refusing(local: Local, error: Exception, times: int) -> Callable[[str, WireMessage], WireMessage | None]:
    left = [times]

    def before(peer: str, message: WireMessage) -> WireMessage | None:
        if isinstance(message, StepFrame) and left[0]:
            left[0] -= 1
            local.hub.carry(peer, "client", failed_of(error, message.session, message.generation, peer=peer))  # type: ignore[arg-type]
            return None
        return message

    return before


def test_a_full_server_is_waited_for(make_swarm: MakeSwarm, checkpoints: dict[str, Path]) -> None:
    local, hidden = make_swarm(checkpoints["llama"], SERVERS), inputs()
    local.before = refusing(local, Busy(0.01), 3)
    with opened(local) as session:
        assert_close(in_turns(session, hidden), whole(checkpoints["llama"], hidden))
    assert not local.servers.bans.banned()


def test_a_step_that_fails_leaves_the_session_where_it_was(make_swarm: MakeSwarm, checkpoints: dict[str, Path]) -> None:
    directory, hidden = checkpoints["llama"], inputs()
    local = make_swarm(directory, {"a": (0, 4)}, request_timeout=2.0)
    with opened(local) as session:
        session.step(hidden[:, :5])
        with pytest.raises(InvalidSetting, match="NaN"):
            session.step(torch.full((2, 3, 64), float("nan")))
        with pytest.raises(InvalidSetting, match=r"\[2, rows, hidden\]"):
            session.step(hidden[:1, 5:])
        with pytest.raises(InvalidSetting, match="attention_mask"):
            session.step(hidden[:, 5:], torch.ones(2, 3))
        with pytest.raises(PromptTooLong, match="100"):
            session.step(inputs(columns=96))
        assert_close(session.step(hidden[:, 5:]), whole(directory, hidden)[:, 5:])
        killing(local, StepFrame, "a")
        with pytest.raises(NoRoute):
            session.step(hidden[:, :5])
        assert session.position == sum(TURNS)
    with pytest.raises(InvalidSetting, match="closed"):
        session.step(hidden)


def test_closing_frees_the_servers(make_swarm: MakeSwarm, checkpoints: dict[str, Path]) -> None:
    local = make_swarm(checkpoints["llama"], {"a": (0, 4)})
    session = opened(local)
    session.step(inputs())
    assert local.spans[0].sessions == 2
    session.close()
    session.close()
    with opened(local) as other:  # its step comes behind what closes the first
        other.step(inputs(1))
        assert local.spans[0].sessions == 1
