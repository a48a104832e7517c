"""Calls through servers that fail: the same numbers from others, and typed errors where there are none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from msgspec import structs

from corolla.engine.calls import backward, forward
from corolla.errors import ActivationsGone, Busy, CorollaError, InvalidSetting, NoRoute, PromptNeeded, ServerFault
from corolla.messages import BackwardFrame, ForwardFrame, Leaving, PromptFrame, ResultFrame, WireMessage
from corolla.models.span import load_span
from corolla.remote.servers import RemoteConfig
from corolla.swarm.arrays import to_array
from corolla.swarm.convert import failed_of
from corolla.types import Span
from tests.engine.stock import example, finish
from tests.remote.conftest import MakeSwarm
from tests.remote.swarm import Local, killing, record

WHOLE = Span(0, 4)
LENGTHS = (9, 4, 6)
SPARE = {"a": (0, 2), "b": (2, 4), "c": (0, 1), "d": (1, 3), "e": (3, 4)}


@pytest.fixture
def llama(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


def step(local: Local, prompts: int = 0) -> list[torch.Tensor]:
    """What comes of a forward and its backward."""
    sequences, gradient = example(WHOLE, LENGTHS, 64, prompts)
    out, trails = local.calls.forward(WHOLE, LENGTHS, sequences.hidden, sequences.prompts)
    return [out, *(one for one in local.calls.backward(trails, gradient, sequences.prompts) if one is not None)]


def expected(directory: Path, prompts: int = 0) -> list[torch.Tensor]:
    model = load_span(directory, dtype="float32")
    sequences, gradient = example(WHOLE, LENGTHS, 64, prompts)
    gradients = finish(backward(model, sequences, gradient))
    return [finish(forward(model, sequences)), gradients.hidden, *([] if gradients.prompts is None else [gradients.prompts])]


def assert_equal(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("servers", [{"a": (0, 4)}, {"a": (0, 2), "b": (2, 4)}, {"a": (0, 1), "b": (1, 3), "c": (2, 4)}])
@pytest.mark.parametrize("call_rows", [5, 512])
def test_a_step_is_what_one_process_computes(
    make_swarm: MakeSwarm, llama: Path, servers: dict[str, tuple[int, int]], prompts: int, call_rows: int
) -> None:
    assert_equal(step(make_swarm(llama, servers, call_rows=call_rows), prompts), expected(llama, prompts))


@pytest.mark.parametrize("kind", [ForwardFrame, BackwardFrame])
@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_servers_death_changes_no_number(make_swarm: MakeSwarm, llama: Path, kind: type, victim: str) -> None:
    local = make_swarm(llama, SPARE)
    killed = killing(local, kind, victim)
    assert_equal(step(local, prompts=3), expected(llama, prompts=3))
    assert killed == [victim]
    assert local.servers.bans.banned() == {victim}


def watched(local: Local) -> list[tuple[str, WireMessage]]:
    """Who is sent what."""
    seen: list[tuple[str, WireMessage]] = []

    def before(peer: str, message: WireMessage) -> WireMessage:
        seen.append((peer, message))
        return message

    local.before = before
    return seen


def test_a_prompt_is_sent_once(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, {"a": (0, 2), "b": (2, 4)}, call_rows=5)
    seen = watched(local)
    assert_equal(step(local, prompts=3), expected(llama, prompts=3))
    assert sorted(peer for peer, message in seen if isinstance(message, PromptFrame)) == ["a", "b"]
    assert sum(isinstance(message, ForwardFrame) for _, message in seen) == 6


@pytest.mark.parametrize(("servers", "calls"), [({"a": (0, 4)}, 2), ({"a": (0, 2), "b": (2, 4)}, 6)])
def test_a_batch_is_cut_so_that_several_servers_have_work(
    make_swarm: MakeSwarm, llama: Path, servers: dict[str, tuple[int, int]], calls: int
) -> None:
    local = make_swarm(llama, servers)
    seen = watched(local)
    local.calls.forward(WHOLE, (100,) * 6, torch.randn(600, 64))
    assert [sum(peer == server and isinstance(message, ForwardFrame) for peer, message in seen) for server in servers] == [calls] * len(
        servers
    )


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("prompts", [0, 3])
def test_a_backward_brings_gradients_only(make_swarm: MakeSwarm, llama: Path, prompts: int, forgotten: bool) -> None:
    local = make_swarm(llama, {"a": (0, 2), "b": (2, 4)})
    sequences, gradient = example(WHOLE, LENGTHS, 64, prompts)
    out, trails = local.calls.forward(WHOLE, LENGTHS, sequences.hidden, sequences.prompts, keep=True)
    if forgotten:
        for server in local.spans:
            server._calls._answering.kept.lose("client")
    seen = watched(local)
    gradients = [one for one in local.calls.backward(trails, gradient, sequences.prompts) if one is not None]
    assert_equal([out, *gradients], expected(llama, prompts))
    rows = [message.hidden.shape[0] for _, message in seen if isinstance(message, BackwardFrame)]
    assert rows == ([19, 38, 19, 38] if forgotten else [19, 19])
    assert not local.servers.bans.banned()


def test_a_server_that_dies_with_what_it_kept_changes_no_number(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, SPARE)
    sequences, gradient = example(WHOLE, LENGTHS, 64, 3)
    out, trails = local.calls.forward(WHOLE, LENGTHS, sequences.hidden, sequences.prompts, keep=True)
    local.hub.kill("b")
    gradients = [one for one in local.calls.backward(trails, gradient, sequences.prompts) if one is not None]
    assert_equal([out, *gradients], expected(llama, 3))


def test_calls_go_along_several_routes_at_once(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, {"a": (0, 4), "b": (0, 4)}, call_rows=5)
    local.records = [record("a", 0, 4), record("b", 0, 4)]
    seen = watched(local)
    assert_equal(step(local), expected(llama))
    for kind in (ForwardFrame, BackwardFrame):
        assert {peer for peer, message in seen if isinstance(message, kind)} == {"a", "b"}
    local.records = [record("a", 0, 4, quick=3), record("b", 0, 4)]
    seen.clear()
    assert_equal(step(local), expected(llama))
    assert {peer for peer, _ in seen} == {"a"}  # the other one is sixteen times as slow


@pytest.mark.parametrize("kind", [ForwardFrame, BackwardFrame])
@pytest.mark.parametrize("prompts", [0, 3])
def test_a_call_is_of_one_quality(make_swarm: MakeSwarm, llama: Path, kind: type, prompts: int) -> None:
    local = make_swarm(llama, {"a": (0, 2), "b": (2, 4), "c": (0, 2), "d": (2, 4)})
    local.records = [structs.replace(one, weights="packed" if one.peer in "ab" else "int8") for one in local.records]
    killed = killing(local, kind, "b")
    seen, before = list[tuple[str, WireMessage]](), local.before

    def watch(peer: str, message: WireMessage) -> WireMessage | None:
        seen.append((peer, message))
        return before(peer, message)

    local.before = watch
    assert_equal(step(local, prompts), expected(llama, prompts))
    assert killed == ["b"]
    forward, backward = ([peer for peer, message in seen if isinstance(message, one)] for one in (ForwardFrame, BackwardFrame))
    assert forward == ["a", "b", "c", "d"]
    assert backward == (["d", "c"] if kind is ForwardFrame else ["b", "d", "c"])
    seen.clear()
    local.records += [structs.replace(record("e", 0, 4, quick=9), weights="packed")]
    step(local)
    assert {peer for peer, _ in seen} == {"c", "d"}  # however quick another quality is


def test_a_server_that_leaves_gets_no_calls_where_there_is_another(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, {"a": (0, 4), "b": (0, 4)})
    for leaving, taken in (("a", {"b"}), ("b", {"a"})):  # where all leave, the best one is taken
        local.hub.carry(leaving, "client", Leaving())
        time.sleep(0.2)  # for the client's thread to hear it
        seen = watched(local)
        assert_equal(step(local), expected(llama))
        assert {peer for peer, _ in seen} == taken


def test_a_server_that_hangs_is_given_up(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, SPARE, silence=0.2, answer=2.0)
    local.hub.freeze("a")
    assert_equal(step(local), expected(llama))
    assert local.servers.bans.banned() == {"a"}


def test_a_result_that_got_lost_is_asked_for_elsewhere(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, SPARE, request_timeout=3.0)
    local.hub.drop_next("a", "client")
    assert_equal(step(local), expected(llama))


@pytest.mark.parametrize("wrong", [torch.full((19, 64), float("nan")), torch.zeros(18, 64), torch.zeros(19, 32)])
def test_a_result_that_cannot_be_true_is_the_servers_fault(make_swarm: MakeSwarm, llama: Path, wrong: torch.Tensor) -> None:
    local = make_swarm(llama, SPARE)
    liar = local.hub.join("a")
    liar.listen(lambda sender, frame: liar.send(sender, ResultFrame(frame.call, to_array(wrong, "float32"))), lambda peer: None)  # type: ignore[union-attr]
    assert_equal(step(local), expected(llama))
    assert local.servers.bans.banned() == {"a"}


@pytest.mark.parametrize("error", [ActivationsGone(), PromptNeeded()])
def test_a_server_that_forgets_without_end_is_left(make_swarm: MakeSwarm, llama: Path, error: CorollaError) -> None:
    local = make_swarm(llama, SPARE)
    liar = local.hub.join("a")

    def answer(sender: str, frame: WireMessage) -> None:
        if isinstance(frame, (ForwardFrame, BackwardFrame)):
            liar.send(sender, failed_of(error, str(frame.call), 0, peer="a"))

    liar.listen(answer, lambda peer: None)
    assert_equal(step(local, prompts=3), expected(llama, prompts=3))
    assert local.servers.bans.banned() == {"a"}


def test_a_server_that_has_moved_is_left(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, {"a": (0, 1), "b": (2, 4), "c": (0, 1), "d": (1, 3), "e": (3, 4)})
    local.records[0] = record("a", 0, 2, quick=5)
    assert_equal(step(local), expected(llama))
    assert local.servers.bans.banned() == {"a"}


def test_the_callers_mistakes_ban_nobody(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, SPARE)
    with pytest.raises(InvalidSetting, match="NaN"):
        local.calls.forward(WHOLE, (3,), torch.full((3, 64), float("nan")))
    with pytest.raises(InvalidSetting, match="float64"):
        local.calls.forward(WHOLE, (3,), torch.zeros(3, 64, dtype=torch.float64))
    with pytest.raises(InvalidSetting, match="9000 rows"):
        local.calls.forward(WHOLE, (9000,), torch.zeros(9000, 64))
    assert not local.servers.bans.banned()


def test_a_full_server_is_waited_for(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, {"a": (0, 4)})
    full = [2]

    def before(peer: str, message: WireMessage) -> WireMessage | None:
        if isinstance(message, ForwardFrame) and full[0]:
            full[0] -= 1
            local.hub.carry(peer, "client", failed_of(Busy(0.01), str(message.call), 0, peer=peer))
            return None
        return message

    local.before = before
    assert_equal(step(local), expected(llama))
    assert not local.servers.bans.banned()
    full[0] = 10**9
    local.servers.config = RemoteConfig(request_timeout=1.0)
    with pytest.raises(Busy):
        step(local)


def test_without_a_spare_the_blocks_that_are_missing_are_named(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, {"a": (0, 2), "b": (2, 4)}, request_timeout=2.0)
    killing(local, BackwardFrame, "b")
    with pytest.raises(NoRoute, match="2:4"):
        step(local)


def test_retries_end(make_swarm: MakeSwarm, llama: Path) -> None:
    local = make_swarm(llama, SPARE, max_retries=0)
    broken = local.hub.join("a")
    error = ServerFault("out of memory")
    broken.listen(lambda sender, frame: broken.send(sender, failed_of(error, str(frame.call), 0)), lambda peer: None)  # type: ignore[union-attr]
    with pytest.raises(ServerFault, match="out of memory"):
        step(local)


def test_servers_are_chosen_among_the_allowed(make_swarm: MakeSwarm, llama: Path) -> None:
    asked: set[str] = set()

    def before(peer: str, message: WireMessage) -> WireMessage:
        asked.add(peer)
        return message

    for config in ({"allowed_servers": frozenset("cde")}, {"blocked_servers": frozenset("a")}):
        local = make_swarm(llama, {"a": (0, 4), "c": (0, 1), "d": (1, 3), "e": (3, 4)}, **config)
        local.before = before
        step(local)
        assert asked == set("cde")


@pytest.mark.parametrize(
    "setting", [{"request_timeout": 0}, {"max_retries": -1}, {"call_rows": 0}, {"allowed_servers": "QmPeer"}, {"parallel": 0}]
)
def test_settings_outside_their_range_are_named(setting: dict[str, object]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(setting))):
        RemoteConfig(**setting)  # type: ignore[arg-type]
