"""LoRA adapters at several servers over the network of one process: held, given, mixed, and kept when a server dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from corolla.client.session import Session
from corolla.errors import AdapterError, InvalidSetting, NoRoute
from corolla.models.adapters import Adapter, load_adapter
from corolla.models.checkpoint import read_config
from corolla.models.families import architecture
from corolla.swarm.convert import from_adapter_part
from corolla.types import GenerationSettings, Span
from tests.models import lora, tiny
from tests.server.ring import PROMPT, TIMEOUT, Swarm

SETTINGS = GenerationSettings(max_tokens_to_generate=24)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def saved(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [lora.save(directory, tmp_path_factory.mktemp("adapter"), seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def adapters(directory: Path, saved: list[Path]) -> list[Adapter]:
    return [load_adapter(path, architecture(read_config(directory))) for path in saved]


@pytest.fixture(scope="module")
def expected(directory: Path, saved: list[Path]) -> list[list[int]]:
    """What PEFT answers with each adapter, and the base without any."""
    return [lora.Adapted(directory, path).greedy(PROMPT, 24) for path in (*saved, None)]


@pytest.fixture
def swarm(directory: Path) -> Iterator[Swarm]:
    swarm = Swarm(directory)
    for name, start, end in (("a", 0, 2), ("b", 2, 3), ("c", 3, 4)):
        swarm.add(name, start, end)
    yield swarm
    swarm.close()


def hold(swarm: Swarm, name: str, adapter: Adapter) -> None:
    """As a server that was started with it."""
    engine, record = swarm.engines[name], swarm.records[name]
    engine.adapters.hold(adapter.part(engine.model.span))
    swarm.records[name] = msgspec.structs.replace(record, adapters={**record.adapters, "one": adapter.digest})


def take(swarm: Swarm, *names: str) -> None:
    for name in names:
        swarm.records[name] = msgspec.structs.replace(swarm.records[name], takes_adapters=True)


def tokens(session: Session, settings: GenerationSettings = SETTINGS) -> list[int]:
    return [token.token_id for token in session.generate(PROMPT, settings, timeout=TIMEOUT)]


def test_servers_that_hold_it_answer_to_its_digest(swarm: Swarm, adapters: list[Adapter], expected: list[list[int]]) -> None:
    for name in "abc":
        hold(swarm, name, adapters[0])
    with Session(swarm.transport, "", adapter=adapters[0].digest) as session:
        assert tokens(session) == expected[0]
    with Session(swarm.transport, "") as session:
        assert tokens(session) == expected[2]


def test_servers_that_take_it_are_given_their_blocks_once(swarm: Swarm, adapters: list[Adapter], expected: list[list[int]]) -> None:
    hold(swarm, "b", adapters[0])
    take(swarm, "a", "b", "c")
    for _ in range(2):
        with Session(swarm.transport, "", adapter=adapters[0]) as session:
            assert tokens(session) == expected[0]
    assert [len(engine.adapters) for engine in swarm.engines.values()] == [1, 1, 1]
    assert sum(server.counters.refused for server in swarm.servers.values()) == 1


def test_sessions_of_different_adapters_share_steps(swarm: Swarm, adapters: list[Adapter], expected: list[list[int]]) -> None:
    take(swarm, "a", "b", "c")
    sessions = [Session(swarm.transport, "", adapter=adapter) for adapter in (*adapters, None)]
    answers = [session.generate(PROMPT, SETTINGS, timeout=TIMEOUT) for session in sessions]
    together = [[token.token_id for token in row] for row in zip(*answers, strict=True)]
    assert [list(one) for one in zip(*together, strict=True)] == expected
    for session in sessions:
        session.close()


@pytest.mark.parametrize("victim", ["a", "c"])
def test_an_answer_keeps_its_adapter_when_a_server_dies(
    swarm: Swarm, adapters: list[Adapter], expected: list[list[int]], victim: str
) -> None:
    take(swarm, "a", "b", "c")
    start, end = swarm.records[victim].start, swarm.records[victim].end
    swarm.add("plain", start, end, throughput=1e6)  # which neither holds nor takes it
    swarm.add("spare", start, end, throughput=1.0)
    take(swarm, "spare")
    with Session(swarm.transport, "", adapter=adapters[0]) as session:
        answer = []
        for token in session.generate(PROMPT, SETTINGS, timeout=TIMEOUT):
            answer.append(token.token_id)
            if len(answer) == 9:
                swarm.kill(victim)
    assert answer == expected[0]
    assert "spare" in swarm.routes[-1].peers
    assert all("plain" not in route.peers for route in swarm.routes)


def test_a_server_that_forgot_it_is_given_it_again(swarm: Swarm, adapters: list[Adapter], expected: list[list[int]]) -> None:
    take(swarm, "a", "b", "c")
    with Session(swarm.transport, "", adapter=adapters[0]) as session:
        answer = []
        for token in session.generate(PROMPT, SETTINGS, timeout=TIMEOUT):
            answer.append(token.token_id)
            if len(answer) == 5:
                swarm.engines["b"].adapters._kept.clear()
    assert answer == expected[0]
    assert not swarm.transport.bans.banned()


def test_where_nobody_has_it_there_is_no_route(swarm: Swarm, adapters: list[Adapter]) -> None:
    hold(swarm, "a", adapters[0])
    with (
        Session(swarm.transport, "", adapter=adapters[0]) as session,
        pytest.raises(NoRoute, match=f"2:4 with the adapter {adapters[0].digest[:12]}"),
    ):
        list(session.generate(PROMPT, SETTINGS, timeout=0.1))


def test_a_record_that_is_out_of_date_costs_a_detour(swarm: Swarm, adapters: list[Adapter], expected: list[list[int]]) -> None:
    """The server takes none any more and does not have it."""
    for name in "abc":
        hold(swarm, name, adapters[0])
    swarm.add("b2", 2, 3, throughput=1.0)
    hold(swarm, "b2", adapters[0])
    swarm.engines["b"].adapters._kept.clear()
    swarm.engines["b"].adapters.takes = False
    with Session(swarm.transport, "", adapter=adapters[0].digest) as session:
        assert tokens(session) == expected[0]
    assert swarm.routes[-1].peers == ("a", "b2", "c")


def test_one_that_was_sent_wrong_is_refused_by_name(swarm: Swarm, adapters: list[Adapter]) -> None:
    """By a peer that says of one adapter's blocks that they are another's."""
    take(swarm, "a", "b", "c")
    liar = swarm.hub.join("liar")
    liar.listen(lambda sender, message: None, lambda peer: None)
    good, other = adapters[0].part(Span(0, 1)), next(iter(from_adapter_part(adapters[1].part(Span(0, 1)))))
    liar.send("a", msgspec.structs.replace(other, digest=good.digest, digests=good.digests))
    deadline = time.monotonic() + TIMEOUT
    while not swarm.engines["a"].adapters._refused:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(swarm.engines["a"].adapters) == 0
    with Session(swarm.transport, "", adapter=adapters[0]) as session:
        assert len(tokens(session)) == 24  # what the liar sent concerns nobody else


def test_a_client_whose_adapter_is_too_large_is_told(swarm: Swarm, adapters: list[Adapter]) -> None:
    from corolla.engine.adapters import AdapterLimits

    take(swarm, "a", "b", "c")
    swarm.engines["c"].adapters._limits = AdapterLimits(size=100)
    with Session(swarm.transport, "", adapter=adapters[0]) as session:
        with pytest.raises(InvalidSetting, match="100 bytes"):
            tokens(session)
        assert session.tokens == []
    assert not swarm.transport.bans.banned()


def test_who_is_being_sent_one_is_waited_for_until_it_is_there(swarm: Swarm, adapters: list[Adapter]) -> None:
    swarm.hub.freeze("a")
    swarm.transport.parts.give_adapter("a", adapters[0].part(Span(0, 2)))
    assert swarm.transport.parts.carrying("a")
    swarm.transport.parts.give_adapter("b", adapters[0].part(Span(2, 3)))
    deadline = time.monotonic() + TIMEOUT
    while swarm.transport.parts.carrying("b"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert swarm.transport.parts.carrying("a")


def test_a_name_stands_for_one_digest(adapters: list[Adapter]) -> None:
    from corolla.client.discovery import adapter_named
    from tests.swarm.simulation import make_record

    one, two = (adapter.digest for adapter in adapters)
    records = [make_record("a", 0, 2, adapters={"poet": one}), make_record("b", 0, 2, adapters={"poet": one, "cook": two})]
    assert [adapter_named(name, records) for name in ("poet", "cook", two, two[:8])] == [one, two, two, two]
    with pytest.raises(AdapterError, match="they have: cook, poet"):
        adapter_named("baker", records)
    with pytest.raises(AdapterError, match="several adapters"):
        adapter_named("poet", [*records, make_record("c", 0, 2, adapters={"poet": two})])
