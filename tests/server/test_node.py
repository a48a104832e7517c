"""Servers of spans and a client over the network of one process: the ring, and what happens when servers die or hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from corolla.barrier import unexpected
from corolla.client.counters import ask_counters
from corolla.client.session import Session
from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.sequence import Deliver
from corolla.errors import CapacityError, InvalidSetting
from corolla.messages import Close, Message
from corolla.models.reference import Reference
from corolla.models.span import load_span
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.types import FinishReason, GenerationSettings, Span
from tests.models import tiny
from tests.server.ring import PROMPT, SAMPLED, SETTINGS, TIMEOUT, Swarm, answer
from tests.swarm.simulation import make_record


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def swarm(directory: Path) -> Iterator[Swarm]:
    swarm = Swarm(directory)
    for name, start, end in (("a", 0, 1), ("b", 1, 3), ("c", 3, 4)):
        swarm.add(name, start, end)
    yield swarm
    swarm.close()


def test_three_servers_answer_as_stock_does(swarm: Swarm, directory: Path) -> None:
    assert answer(swarm) == Reference(directory).greedy(PROMPT, 30)


def test_one_server_with_every_block_answers_the_same(directory: Path) -> None:
    swarm = Swarm(directory)
    swarm.add("whole", 0, 4)
    assert answer(swarm) == Reference(directory).greedy(PROMPT, 30)
    swarm.close()


def test_sampling_with_a_penalty_is_the_same_on_any_route(swarm: Swarm) -> None:
    along_three = answer(swarm, SAMPLED)
    swarm.add("whole", 0, 4, throughput=1e6)
    assert answer(swarm, SAMPLED) == along_three
    assert swarm.routes[-1].peers == ("whole",)


def test_servers_that_overlap_compute_each_block_once(directory: Path) -> None:
    swarm = Swarm(directory)
    for name, start, end in (("a", 0, 3), ("b", 1, 4)):
        swarm.add(name, start, end)
    assert answer(swarm) == Reference(directory).greedy(PROMPT, 30)
    assert sum(hop.end - hop.start for hop in swarm.routes[-1].hops) == 4
    swarm.close()


def test_two_servers_that_lose_one_another_are_gone_around(swarm: Swarm, directory: Path) -> None:
    swarm.add("spare", 3, 4, throughput=1.0)
    assert answer(swarm, at={6: lambda: swarm.hub.part("b", "c")}) == Reference(directory).greedy(PROMPT, 30)
    assert swarm.routes[-1].peers == ("a", "b", "spare")


def test_a_second_turn_sends_only_what_is_new(swarm: Swarm) -> None:
    with Session(swarm.transport, "") as session:
        list(session.generate(PROMPT, SETTINGS, timeout=TIMEOUT))
        before = {name: engine.counters.rows for name, engine in swarm.engines.items()}
        list(session.generate([7, 8, 9], GenerationSettings(max_tokens_to_generate=1), timeout=TIMEOUT))
        assert {name: engine.counters.rows - before[name] for name, engine in swarm.engines.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize("moment", [1, 17])
def test_a_killed_server_is_replaced_token_for_token(swarm: Swarm, directory: Path, victim: str, moment: int) -> None:
    spare = swarm.records[victim]
    swarm.add("spare", spare.start, spare.end, throughput=1.0)
    assert answer(swarm, at={moment: lambda: swarm.kill(victim)}) == Reference(directory).greedy(PROMPT, 30)
    assert victim in swarm.routes[0].peers
    assert victim not in swarm.routes[-1].peers


def test_two_deaths_in_one_sampled_answer(swarm: Swarm) -> None:
    expected = answer(swarm, SAMPLED)
    swarm.add("a2", 0, 1, throughput=1.0)
    swarm.add("c2", 3, 4, throughput=1.0)
    assert answer(swarm, SAMPLED, at={4: lambda: swarm.kill("a"), 15: lambda: swarm.kill("c")}) == expected


def test_a_hung_server_is_as_dead_as_a_killed_one(swarm: Swarm, directory: Path) -> None:
    swarm.add("spare", 1, 3, throughput=1.0)
    assert answer(swarm, at={5: lambda: swarm.hub.freeze("b")}) == Reference(directory).greedy(PROMPT, 30)
    assert "b" not in swarm.routes[-1].peers


def test_a_missing_block_is_waited_for(swarm: Swarm, directory: Path) -> None:
    def replace_b() -> None:
        swarm.kill("b")
        del swarm.records["b"]
        swarm.add("late", 1, 3)

    assert answer(swarm, at={3: replace_b}) == Reference(directory).greedy(PROMPT, 30)


def test_a_block_that_nobody_holds_is_named_by_the_deadline(swarm: Swarm) -> None:
    del swarm.records["b"]
    with Session(swarm.transport, "") as session, pytest.raises(CapacityError, match="1:3"):
        list(session.generate(PROMPT, SETTINGS, timeout=0.2))


def test_a_bad_setting_bans_nobody(swarm: Swarm) -> None:
    settings = GenerationSettings(top_k=tiny.VOCABULARY + 1)
    with Session(swarm.transport, "") as session, pytest.raises(InvalidSetting, match="top_k"):
        list(session.generate(PROMPT, settings, timeout=TIMEOUT))
    assert not swarm.transport.bans.banned()


def test_stopping_early_and_leaving_free_the_pages(swarm: Swarm) -> None:
    session = Session(swarm.transport, "")
    tokens = session.generate(PROMPT, GenerationSettings(max_tokens_to_generate=300), timeout=TIMEOUT)
    assert [next(tokens).finish for _ in range(5)] == [None] * 5
    tokens.close()
    session.close()
    wait_until(lambda: all(engine.pool.free_pages == engine.pool.num_pages for engine in swarm.engines.values()))


def test_many_sessions_at_once(swarm: Swarm, directory: Path) -> None:
    sessions = [Session(swarm.transport, "") for _ in range(8)]
    answers = [session.generate(PROMPT[: 10 + 9 * i], SETTINGS, timeout=TIMEOUT) for i, session in enumerate(sessions)]
    tokens: list[list[int]] = [[] for _ in answers]
    for _ in range(30):
        for got, tokens_of in zip(tokens, answers, strict=True):
            token = next(tokens_of)
            got.append(token.token_id)
    assert token.finish is FinishReason.LENGTH
    reference = Reference(directory)
    assert tokens == [reference.greedy(PROMPT[: 10 + 9 * i], 30) for i in range(8)]
    for session in sessions:
        session.close()


def test_a_leaving_server_hands_its_sessions_over_and_takes_no_new_ones(swarm: Swarm, directory: Path) -> None:
    swarm.add("spare", 1, 3, throughput=1.0)
    assert answer(swarm, at={5: swarm.servers["b"].leave}) == Reference(directory).greedy(PROMPT, 30)
    assert swarm.routes[-1].peers == ("a", "spare", "c")
    assert swarm.servers["b"].sessions == 0
    assert swarm.transport.counters.faults == 0
    swarm.servers["spare"].close()  # nobody else holds its blocks, and who leaves takes nothing new
    with Session(swarm.transport, "") as session, pytest.raises(CapacityError):
        list(session.generate(PROMPT, SETTINGS, timeout=2.0))


def test_a_leaving_server_serves_an_answer_that_nobody_else_can_take(swarm: Swarm, directory: Path) -> None:
    assert answer(swarm, at={5: swarm.servers["b"].leave}) == Reference(directory).greedy(PROMPT, 30)
    assert len(swarm.routes) == 1


def test_an_idle_session_leaves_too(swarm: Swarm, directory: Path) -> None:
    swarm.add("spare", 1, 3, throughput=1.0)
    with Session(swarm.transport, "") as session:
        first = [token.token_id for token in session.generate(PROMPT, SETTINGS, timeout=TIMEOUT)]
        swarm.servers["b"].leave()
        wait_until(lambda: swarm.servers["b"].sessions == 0)
        second = [token.token_id for token in session.generate([7, 8], SETTINGS, timeout=TIMEOUT)]
    assert second == Reference(directory).greedy([*PROMPT, *first, 7, 8], 30)


def test_a_server_that_has_become_slow_is_left(swarm: Swarm, directory: Path) -> None:
    swarm.add("spare", 1, 3)
    b = swarm.records["b"]
    long = GenerationSettings(max_tokens_to_generate=300)

    def slow_down() -> None:
        swarm.records["b"] = msgspec.structs.replace(b, throughput=1.0)
        time.sleep(0.5)  # tokens wait meanwhile; the transport's thread looks again

    swarm.records["spare"] = msgspec.structs.replace(swarm.records["spare"], throughput=50.0)
    assert answer(swarm, long, at={5: slow_down}) == Reference(directory).greedy(PROMPT, 300)
    assert swarm.transport.counters.moves == 1
    assert swarm.routes[0].peers == ("a", "b", "c")


def test_sessions_share_a_room_for_a_few(directory: Path) -> None:
    swarm = Swarm(directory)
    for name, start, end in (("a", 0, 2), ("b", 2, 4)):
        swarm.add(name, start, end, cache_tokens=16 * 8 * 4)  # room for four sessions of 128 tokens
    found: dict[int, list[int]] = {}

    def chat(index: int) -> None:
        with Session(swarm.transport, "") as session:
            found[index] = [token.token_id for token in session.generate(PROMPT[index:], SETTINGS, timeout=60.0)]

    threads = [threading.Thread(target=chat, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reference = Reference(directory)
    assert found == {index: reference.greedy(PROMPT[index:], 30) for index in range(16)}
    swarm.close()


def test_a_message_that_got_lost_is_asked_for_again(swarm: Swarm, directory: Path) -> None:
    assert answer(swarm, at={6: lambda: swarm.hub.drop_next("b", "c")}) == Reference(directory).greedy(PROMPT, 30)
    assert swarm.transport.counters.replays == 1
    assert swarm.transport.counters.faults == 0


def test_the_end_of_an_old_route_does_not_end_a_new_one(swarm: Swarm, directory: Path) -> None:
    with Session(swarm.transport, "") as session:
        tokens = [token.token_id for token in session.generate(PROMPT, SETTINGS, timeout=TIMEOUT)]
        for server in ("a", "b", "c"):  # it comes late
            swarm.transport.network.send(server, Close(session.name, 0))
        before = swarm.engines["b"].counters.rows
        tokens += [token.token_id for token in session.generate([7], SETTINGS, timeout=TIMEOUT)]
        assert swarm.engines["b"].counters.rows - before < len(PROMPT)
    assert tokens[30:] == Reference(directory).greedy([*PROMPT, *tokens[:30], 7], 30)


def test_a_close_that_overtakes_the_first_step_leaves_nothing_open(swarm: Swarm, directory: Path) -> None:
    """Its steps are stale then; the answer is asked for again, in a later generation."""
    with Session(swarm.transport, "") as session:
        swarm.transport.network.send("b", Close(session.name, 1))
        assert [token.token_id for token in session.generate(PROMPT, SETTINGS, timeout=TIMEOUT)] == Reference(directory).greedy(PROMPT, 30)
        assert not swarm.transport.bans.banned()
    wait_until(lambda: swarm.servers["b"].sessions == 0)


class Fragile(Engine):
    """Raises what nobody expects for one step."""

    fails = False

    def receive(self, message: Message, deliver: Deliver | None = None) -> None:
        if self.fails:
            self.fails = False
            raise KeyError("nobody expects this")
        super().receive(message, deliver)


def test_an_unexpected_error_over_a_step_ends_that_step_and_the_answer_goes_on_elsewhere(swarm: Swarm, directory: Path) -> None:
    engine = Fragile(load_span(directory, Span(1, 3), dtype="float32"), EngineConfig(cache_tokens=2048, page_size=16))
    engine.start()
    fragile = SpanServer(engine, swarm.hub.join("fragile"), SpanServerConfig(wire_dtype="float32"))
    swarm.records["fragile"] = make_record("fragile", 1, 3, blocks=4, throughput=1e6, expires=time.time() + 1e6)
    before = unexpected["a server's message"]
    assert answer(swarm, at={5: lambda: setattr(engine, "fails", True)}) == Reference(directory).greedy(PROMPT, 30)
    assert unexpected["a server's message"] == before + 1
    assert swarm.routes[0].peers == ("a", "fragile", "c")
    assert swarm.routes[-1].peers == ("a", "b", "c")
    fragile.close()


def test_timings_name_every_server_of_the_route(swarm: Swarm) -> None:
    swarm.transport.timed = True
    with Session(swarm.transport, "") as session:
        tokens = list(session.generate(PROMPT, SETTINGS, timeout=TIMEOUT))
    for token in tokens:
        assert [timing.peer for timing in token.timings] == ["a", "b", "c"]
        assert all(timing.compute > 0 and timing.queue >= 0 for timing in token.timings)


def test_counters_show_pushes_and_ring_steps(swarm: Swarm) -> None:
    answer(swarm)
    assert swarm.servers["a"].counters.pushes >= 30
    assert swarm.servers["c"].counters.ring_steps == 29


def test_a_server_tells_what_it_holds_and_that_it_holds_nothing_more(swarm: Swarm) -> None:
    def held() -> list[dict[str, int]]:
        observer = swarm.hub.join("observer")
        names = swarm.servers["a"].gauges.keys()
        return [
            {name: count for name, count in counts.items() if name in names} for counts in ask_counters(observer, ["a"], TIMEOUT).values()
        ]

    with Session(swarm.transport, "") as session:
        list(session.generate(PROMPT, SETTINGS, timeout=TIMEOUT))
        assert [(here["sessions_open"], here["sessions_cached"]) for here in held()] == [(1, 1)]
        assert held()[0]["pages_held"] >= len(PROMPT) // 16
    wait_until(lambda: not any(swarm.servers["a"].gauges.values()))
    assert held() == [dict.fromkeys(swarm.servers["a"].gauges, 0)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_prompts_tokens_score_on_any_route_as_on_one_server(swarm: Swarm) -> None:
    def scored() -> dict[int, float]:
        with Session(swarm.transport, "") as session:
            list(session.generate(PROMPT, GenerationSettings(max_tokens_to_generate=2, prompt_logprobs=True), timeout=TIMEOUT))
            return {position: score.logprob for position, score in session.scores.items()}

    along_three = scored()
    swarm.add("whole", 0, 4, throughput=1e6)
    assert list(along_three) == list(range(1, len(PROMPT)))
    assert scored() == pytest.approx(along_three, abs=1e-4)
    assert swarm.routes[-1].peers == ("whole",)
