"""How many rows of a prompt a forward takes, and what of rows and pages each client has."""

from __future__ import annotations

from typing import Any

import pytest

from corolla.engine.clock import AwakeClock
from corolla.engine.page_pool import PagePool
from corolla.engine.scheduler import Scheduler
from corolla.engine.sequence import Sequence
from corolla.messages import Cached
from corolla.models.span import SpanModel
from corolla.types import GenerationSettings, Span, Step
from tests.engine.test_engine import Driver, alone, prompt


@pytest.mark.parametrize(
    ("rows", "gives_hidden", "parts"),
    [
        (111, False, [111]),  # nobody waits for the first half of it
        (600, False, [256, 256, 88]),
        (80, True, [80]),
        (111, True, [56, 55]),
        (1000, True, [125, 110, 96, 84, 74, 64, 64, 64, 64, 64, 64, 64, 63]),
        (4000, True, [256] * 8),
    ],
)
def test_what_goes_on_goes_in_parts(rows: int, gives_hidden: bool, parts: list[int]) -> None:
    pool = PagePool(num_pages=400, page_size=16)
    scheduler = Scheduler(pool, step_rows=256, clock=AwakeClock())
    sequence = Sequence("a", pool.open(), Span(0, 2), takes_hidden=False, shares_prefixes=False, tokens=[5] * rows)
    sequence.settings, sequence.gives_hidden, sequence.deliver = GenerationSettings(), gives_hidden, print
    found = []
    while sequence.pending and len(found) < len(parts):
        ((_, work),) = scheduler.schedule([sequence]).work
        pool.advance(sequence.table, work.rows.count)
        found.append(work.rows.count)
    assert found == parts


def driver(model: SpanModel, **config: Any) -> Driver:
    return Driver(model, **{"cache_tokens": 512, "page_size": 16, "drafts": 0, "step_rows": 256, **config})


def ask(driver: Driver, client: str, session: str, tokens: list[int], count: int, asked: int = 0) -> None:
    settings = GenerationSettings(max_tokens_to_generate=count)
    step = Step(session, 0, tokens, settings=settings, client=client, asked=asked)
    driver.engine.receive(step, driver.replies[session].append)


def rows_of_turns(driver: Driver, session: str, count: int) -> list[int]:
    """The rows of each forward until a session has so many tokens."""
    rows = []
    while len(driver.tokens(session)) < count:
        before = driver.engine.counters.rows
        assert driver.engine.run_once()
        driver.engine.check_integrity()
        rows.append(driver.engine.counters.rows - before)
    return rows


@pytest.mark.parametrize("asked", [0, 1, 2**62])
def test_another_clients_long_sessions_leave_a_client_its_share_of_rows_and_pages(model: SpanModel, asked: int) -> None:
    """Six sessions of a client that fill the pool; what it says of when it asked helps nobody."""
    busy = driver(model)
    for number in range(6):
        ask(busy, "many", str(number), prompt(number, 100), 200, asked)
    for _ in range(30):
        busy.engine.run_once()
    ask(busy, "one", "short", prompt(9, 72), 12)
    rows = rows_of_turns(busy, "short", 12)
    assert len(rows) == 12
    assert rows[0] <= 72 + 8
    assert sum(rows[1:]) <= 11 * (1 + 8) + 128  # once the others have what they did not use before
    assert busy.tokens("short") == alone(model, prompt(9, 72))[:12]
    busy.run()
    assert all(busy.tokens(str(n)) == alone(model, prompt(n, 100), GenerationSettings(max_tokens_to_generate=200)) for n in range(2))


def test_clients_take_turns_where_not_all_fit_a_step(model: SpanModel) -> None:
    busy = driver(model, cache_tokens=4096, step_rows=4)
    for number in range(12):
        ask(busy, "many", str(number), prompt(number, 2), 200)
    busy.engine.run_once()
    ask(busy, "one", "short", prompt(9, 2), 12)
    assert len(rows_of_turns(busy, "short", 12)) <= 14


def test_a_client_that_is_alone_has_whole_steps(model: SpanModel) -> None:
    busy = driver(model, cache_tokens=4096)
    for number in range(3):
        ask(busy, "many", str(number), prompt(number, 200), 5)
    assert rows_of_turns(busy, "0", 1) == [256]


def test_two_clients_that_want_more_than_half_of_the_pages_both_finish(model: SpanModel) -> None:
    busy = driver(model)
    settings = GenerationSettings(max_tokens_to_generate=250)
    for number in range(2):
        ask(busy, str(number), str(number), prompt(number, 100), 250)
    busy.run(2000)
    assert all(busy.tokens(str(n)) == alone(model, prompt(n, 100), settings) for n in range(2))
    assert busy.engine.counters.evicted_running <= 10


def test_what_others_keep_of_their_share_is_not_evicted_for_a_client_with_more(model: SpanModel) -> None:
    busy = driver(model)
    ask(busy, "one", "kept", prompt(9, 100), 1)
    busy.run()
    for number in range(8):
        ask(busy, "many", str(number), prompt(number, 100), 1)
        busy.run()
    before = busy.engine.counters.rows
    busy.engine.receive(Step("kept", 100, prompt(8, 5), generation=1, client="one"), busy.replies["kept"].append)
    busy.run()
    assert busy.replies["kept"][-1] == Cached("kept", 1, 105)
    assert busy.engine.counters.rows - before == 5


def test_a_session_whose_tokens_came_while_the_process_slept_is_not_lost(model: SpanModel) -> None:
    pool, clock = PagePool(num_pages=4, page_size=16), AwakeClock()
    scheduler = Scheduler(pool, 256, clock)
    waiting, other = (
        Sequence(name, pool.open(), Span(0, 2), takes_hidden=False, shares_prefixes=False, tokens=[5] * 64, client="c") for name in "ab"
    )
    for number, sequence in enumerate((waiting, other)):
        sequence.deliver, sequence.arrival, sequence.seen = print, (0, number), clock.now()
    assert len(scheduler.schedule([waiting]).work) == 1
    pool.advance(waiting.table, 64)
    clock._seen -= 3600.0  # as after a SIGSTOP of an hour
    schedule = scheduler.schedule([waiting, other])
    assert (schedule.evicted, schedule.preempted, schedule.work) == ([], [], [])
