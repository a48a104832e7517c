"""Bytes that clients make an engine hold: what waits, what is remembered, what is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from corolla.engine.adapters import AdapterLimits, AdapterStore
from corolla.engine.budgets import Budgets, Ledger
from corolla.engine.counters import coarse
from corolla.errors import Busy
from corolla.messages import Cached, Cancel, Close, Token
from corolla.models.adapters import digest_of, joined_digest
from corolla.models.span import SpanModel, load_span
from corolla.types import AdapterPart, Span, Step
from tests.engine.test_engine import GREEDY, Driver, alone, prompt

MIB = 2**20


def test_the_parts_of_a_budget_are_the_whole() -> None:
    budgets = Budgets(4 * 2**30)
    assert budgets.steps + budgets.calls + budgets.prompts + budgets.adapters + budgets.activations == budgets.size


def test_a_ledger_has_a_share_for_each_client_and_room_for_one_thing_of_any_size() -> None:
    ledger = Ledger(size=100, per_client=40, retry_after=0.5)
    ledger.take("a", 70)
    with pytest.raises(Busy) as busy:
        ledger.take("a", 1)
    assert busy.value.retry_after == 0.5
    ledger.take("b", 20)
    with pytest.raises(Busy):
        ledger.take("b", 21)
    with pytest.raises(Busy):
        ledger.take("c", 11)
    ledger.give_back("a", 70)
    ledger.take("c", 80)
    ledger.give_back("b", 20)
    ledger.give_back("c", 80)
    assert ledger.total == 0
    ledger.take("d", 1000)


def taken_until_busy(driver: Driver, steps: Iterable[Step]) -> int:
    """How many of one client's steps are taken in."""
    for count, step in enumerate(steps):
        try:
            driver.engine.receive(step, driver.replies[step.client].append)
        except Busy:
            return count
    raise AssertionError("all of them were taken in")


def test_steps_of_one_session_fill_no_inbox(model: SpanModel) -> None:
    driver = Driver(model, max_active=4)
    steps = (Step("a", 0, tuple(prompt(0, 100)), generation, GREEDY, client="greedy") for generation in range(20_000))
    driver.engine.receive(next(steps), driver.replies["greedy"].append)
    driver.engine.run_once()
    assert 1000 < taken_until_busy(driver, steps) < 5000
    assert driver.engine.gauges["bytes_waiting"] <= 32 * MIB
    driver.send("b", prompt(1, 20))  # another client's
    driver.engine.receive(Close("a"))
    driver.run()
    assert driver.tokens("b") == alone(model, prompt(1, 20))
    assert driver.engine.gauges["bytes_waiting"] == 0


def test_rows_that_wait_are_counted_in_bytes_and_given_back(directory: Path) -> None:
    driver = Driver(load_span(directory, Span(2, 4), dtype="float32"), max_active=1000)
    rows = torch.zeros(500, 64)  # 128,000 bytes
    sessions = taken_until_busy(driver, (Step(str(number), 0, rows, client="greedy") for number in range(400)))
    assert 240 < sessions < 260
    driver.engine.receive(Step("other", 0, rows, client="other"), driver.replies["other"].append)
    driver.engine.run_once()
    assert driver.engine.gauges["bytes_waiting"] > 30 * MIB
    for number in range(sessions):
        driver.engine.receive((Cancel, Close)[number % 2](str(number), 0))
    driver.run()
    assert driver.engine.gauges["bytes_waiting"] == 0
    assert driver.replies["other"] == [Cached("other", 0, 500)]


@pytest.mark.parametrize("computed", [False, True])
def test_places_are_shared_by_client(model: SpanModel, *, computed: bool) -> None:
    """Whether those of the client that takes all of them wait in the inbox or are under way."""
    driver = Driver(model, max_active=4)
    for number in range(4):
        driver.send(f"greedy{number}", prompt(number, 20), client="greedy")
    if computed:
        driver.run(1)
    for number in range(2):
        driver.send(f"other{number}", prompt(number, 20), client="other")
    for client in ("greedy", "other"):
        with pytest.raises(Busy):
            driver.send("more", prompt(5, 20), client=client)
    driver.run()
    assert driver.tokens("other0") == alone(model, prompt(0, 20))


def test_a_client_that_holds_all_pages_leaves_room_for_a_newcomer(model: SpanModel) -> None:
    """By what its record says the server is offered to a newcomer, or nobody sends it anything."""
    driver = Driver(model, cache_tokens=256)
    assert driver.engine.free_tokens == 256
    for number in range(4):
        driver.send(f"greedy{number}", prompt(number, 100), client="greedy")
    driver.run(3)
    assert driver.engine.pool.free_pages < 4
    assert driver.engine.free_tokens == 128
    driver.send("other", prompt(7, 80), client="other")
    driver.run()
    assert driver.tokens("other") == alone(model, prompt(7, 80))


def test_a_client_that_shares_its_pages_with_itself_is_remembered_within_bounds(model: SpanModel) -> None:
    driver = Driver(model)
    for number in range(200):
        driver.engine.receive(Step(str(number), 0, prompt(0, 400), client="many"), driver.replies["many"].append)
        driver.run(1)
    driver.engine._sessions._bound_histories("many")
    assert driver.engine.gauges["sessions_cached"] == 200
    known = driver.engine._sessions.get("0")
    assert known is not None
    known.tokens += [5] * 2**19  # as many as of hundreds of long ones
    driver.engine.receive(Step("next", 0, prompt(0, 400), client="many"), driver.replies["many"].append)
    driver.run()
    assert driver.engine._sessions.get("0") is None
    assert driver.engine._sessions.get("199") is not None


def test_a_session_that_is_idle_for_an_hour_without_pages_is_forgotten(model: SpanModel) -> None:
    driver = Driver(model)
    for session in ("kept", "unused"):
        driver.engine.receive(Step(session, 0, prompt(0, 20), settings=GREEDY), driver.replies[session].append)
        if session == "unused":
            driver.engine.receive(Cancel(session, 0))
        driver.run()
    assert driver.engine.gauges["sessions_cached"] == 2
    driver.engine._clock._awake += 3700.0
    driver.run()
    assert driver.engine._sessions.get("unused") is None
    assert driver.engine._sessions.get("kept") is not None


def test_empty_adapters_are_counted_too(model: SpanModel) -> None:
    store, empty = AdapterStore(model, AdapterLimits(size=10**6, size_per_client=10**6)), digest_of({})
    for number in range(1000):
        digests = (empty, hashlib.sha256(str(number).encode()).digest(), empty, empty)
        store.put("client", AdapterPart(joined_digest(digests), Span(0, 1), ({},), digests))
    assert 100 < len(store) < 130
    few = AdapterStore(model, AdapterLimits(count=3))
    for number in range(5):
        digests = (empty, bytes([number]) * 32, empty, empty)
        few.put(str(number), AdapterPart(joined_digest(digests), Span(0, 1), ({},), digests))
    assert len(few) == 3


def test_pages_are_shared_between_clients_only_where_that_is_asked_for(model: SpanModel) -> None:
    for shared, reused in ((False, 48), (True, 96)):
        driver = Driver(model, share_prefixes=shared)
        for session, client in (("a", "a"), ("again", "a"), ("b", "b")):
            driver.engine.receive(Step(session, 0, prompt(5, 60), settings=GREEDY, client=client), driver.replies[session].append)
            driver.run()
            assert driver.tokens(session) == alone(model, prompt(5, 60))
        assert driver.engine.counters.reused == reused


def test_what_strangers_are_told_of_tokens_hides_a_request() -> None:
    assert [coarse(count) for count in (0, 1, 2, 3, 5, 1000, 1001, 1023)] == [0, 1, 2, 3, 4, 768, 768, 768]
    assert coarse(10_000) == coarse(10_000 + 300)


def test_a_token_that_waits_in_vain_is_still_a_token(model: SpanModel) -> None:
    """What is charged for an answer under way is given back at each of its tokens."""
    driver = Driver(model, drafts=0)
    driver.send("a", prompt(0, 20))
    driver.run(3)
    assert isinstance(driver.replies["a"][-1], Token)
    assert driver.engine.gauges["bytes_waiting"] == 0
