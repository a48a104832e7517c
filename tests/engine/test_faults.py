"""Errors that nobody expected, raised in every part of an engine: they end the session that causes them, or the engine, and no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch

from corolla.barrier import unexpected
from corolla.engine.attention import PagedAttention
from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.page_pool import PagePool, PageTable
from corolla.engine.parts import EngineParts
from corolla.errors import CorollaError, ServerFault
from corolla.messages import Cached, Cancel, Close, Reply, Token
from corolla.models.adapters import digest_of, joined_digest
from corolla.models.span import SpanModel
from corolla.types import AdapterPart, Factors, Failed, GenerationSettings, PromptName, PromptPart, Span, Step
from tests.engine.test_engine import Driver, alone, prompt

ERRORS = [IndexError, KeyError, AssertionError, RuntimeError, MemoryError, OSError]
each_error = pytest.mark.parametrize("error", ERRORS)
DEADLINE = 20.0  # seconds


class Faults:
    """Parts of an engine that raise where `when` says so."""

    def __init__(self, error: type[Exception] = KeyError) -> None:
        self.error = error
        self.in_sample: Callable[[Sequence[Any]], bool] = lambda requests: False
        self.in_attention: Callable[[Sequence[Any]], bool] = lambda rows: False
        self.in_reserve: Callable[[PageTable], bool] = lambda table: False
        faults = self

        class Pool(PagePool):
            def reserve(self, table: PageTable, length: int) -> bool:
                faults.raise_if(faults.in_reserve(table))
                return super().reserve(table, length)

        self.parts = EngineParts(sample=self._sample, attend=self._attend, pool=Pool)

    def raise_if(self, now: bool) -> None:
        if now:
            raise self.error("injected")

    def _sample(self, logits: torch.Tensor, requests: Sequence[Any]) -> Any:
        self.raise_if(self.in_sample(requests))
        return EngineParts().sample(logits, requests)

    def _attend(self, arch: Any, cache: Any, rows: Sequence[Any], padded: int, device: torch.device, invariant: bool) -> Any:
        self.raise_if(self.in_attention(rows))
        return PagedAttention.of(arch, cache, rows, padded, device, invariant=invariant)


SHORT = GenerationSettings(max_tokens_to_generate=12)


@lru_cache
def expected(model: SpanModel, seed: int) -> list[int]:
    return alone(model, prompt(seed, 20), SHORT)


def culprit_and_bystanders(model: SpanModel, faults: Faults) -> Driver:
    """Three sessions that are answered together, of which "bad" is the culprit; its seed is 13."""
    driver = Driver(model, parts=faults.parts)
    for session in ("a", "bad", "c"):
        settings = GenerationSettings(max_tokens_to_generate=12, seed=13 if session == "bad" else 0)
        driver.send(session, prompt(ord(session[0]), 20), settings=settings)
    return driver


def only_the_culprit_failed(model: SpanModel, driver: Driver) -> None:
    driver.run()
    driver.engine.check_integrity()
    (*_, last) = driver.replies["bad"]
    assert isinstance(last, Failed)
    assert isinstance(last.error, ServerFault)
    for session in "ac":
        assert driver.tokens(session) == expected(model, ord(session))
    driver.send("next", prompt(9, 20), settings=SHORT)
    driver.run()
    assert driver.tokens("next") == expected(model, 9)
    assert driver.engine.healthy
    assert driver.engine.counters.unexpected > 0


@each_error
def test_in_the_sampler(model: SpanModel, error: type[Exception]) -> None:
    faults = Faults(error)
    faults.in_sample = lambda requests: any(request.settings.seed == 13 and request.position > 25 for request in requests)
    only_the_culprit_failed(model, culprit_and_bystanders(model, faults))


@each_error
def test_in_the_attention(model: SpanModel, error: type[Exception]) -> None:
    faults = Faults(error)
    driver = culprit_and_bystanders(model, faults)
    driver.run(2)
    bad = driver.engine._sessions.get("bad")
    assert bad is not None
    faults.in_attention = lambda rows: any(row.table is bad.table for row in rows)
    only_the_culprit_failed(model, driver)


@each_error
def test_in_the_page_pool(model: SpanModel, error: type[Exception]) -> None:
    faults = Faults(error)
    driver = culprit_and_bystanders(model, faults)
    driver.run(2)
    bad = driver.engine._sessions.get("bad")
    assert bad is not None
    faults.in_reserve = lambda table: table is bad.table
    only_the_culprit_failed(model, driver)


@each_error
def test_in_what_takes_a_reply(model: SpanModel, error: type[Exception]) -> None:
    driver = Driver(model)

    def take(reply: Reply) -> None:
        driver.replies["bad"].append(reply)
        if isinstance(reply, Token) and reply.position > 25:
            raise error("injected")

    for session in "ac":
        driver.send(session, prompt(ord(session), 20), settings=SHORT)
    driver.engine.receive(Step("bad", 0, prompt(98, 20), settings=SHORT), take)
    only_the_culprit_failed(model, driver)


@each_error
def test_in_the_intake_of_prompts_and_adapters(model: SpanModel, error: type[Exception]) -> None:
    def convert(values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        raise error("injected")

    driver = Driver(model, parts=EngineParts(convert=convert))
    name, rows = PromptName("p", 5, deep=False), torch.zeros(5, model.arch.hidden)
    driver.engine.prompts.put("c", PromptPart(name, Span(0, 4), rows.double()))
    outputs, inputs = model.arch.products["up"]
    block = {"up": Factors(torch.ones(1, inputs), torch.ones(outputs, 1))}
    digests = (digest_of(block),) * 4
    digest = joined_digest(digests)
    driver.engine.adapters.put("c", AdapterPart(digest, Span(0, 4), (block,) * 4, digests))
    for session in "ac":
        driver.send(session, prompt(ord(session), 20), settings=SHORT)
    driver.engine.receive(Step("adapted", 0, prompt(1, 20), settings=SHORT, adapter=digest), driver.replies["adapted"].append)
    driver.engine.receive(Step("bad", 0, prompt(1, 20), settings=SHORT, prompt=name, client="c"), driver.replies["bad"].append)
    only_the_culprit_failed(model, driver)
    assert isinstance(driver.replies["adapted"][-1], Failed)


def test_an_error_that_comes_once_in_a_batch_ends_nobody(model: SpanModel) -> None:
    faults = Faults()
    driver = culprit_and_bystanders(model, faults)
    driver.run(2)
    left = iter([True])
    faults.in_attention = lambda rows: next(left, False)
    driver.run()
    assert all(driver.tokens(s) == expected(model, ord(s[0])) for s in ("a", "bad", "c"))
    assert not any(isinstance(reply, Failed) for replies in driver.replies.values() for reply in replies)


def test_scores_of_a_batch_that_is_computed_again_are_told_once(model: SpanModel) -> None:
    settings = GenerationSettings(max_tokens_to_generate=3, prompt_logprobs=True)
    plain, faults = Driver(model), Faults()
    faults.in_sample = lambda requests: any(request.settings.seed == 13 for request in requests)
    driver = Driver(model, parts=faults.parts)
    for each in (plain, driver):
        each.send("a", prompt(0, 100), settings=settings)
        each.run(1)
        each.send("bad", prompt(1, 10), settings=GenerationSettings(seed=13))
        each.run()
    assert driver.replies["a"] == plain.replies["a"]


@each_error
def test_an_engine_that_can_compute_nothing_is_dead(model: SpanModel, error: type[Exception]) -> None:
    faults = Faults(error)
    driver = culprit_and_bystanders(model, faults)
    driver.run(2)
    faults.in_attention = lambda rows: True
    driver.run()
    is_dead(driver.engine)
    assert all(isinstance(driver.replies[session][-1], Failed) for session in ("a", "bad", "c"))


def is_dead(engine: Engine) -> None:
    assert engine.failure
    assert not engine.healthy
    with pytest.raises(ServerFault, match="the engine ended"):
        engine.receive(Step("late", 0, [1, 2]), print)
    with pytest.raises(ServerFault, match="the engine ended"):
        engine.call(iter(()))
    engine.receive(Cancel("a", 0))
    engine.receive(Close("a"))
    assert not engine.run_once()


def test_an_engine_whose_pages_contradict_one_another_is_dead(model: SpanModel) -> None:
    faults = Faults()
    driver = culprit_and_bystanders(model, faults)
    failed: list[CorollaError] = []
    driver.engine.call(iter(lambda: None, 1), failed.append)
    driver.run(2)
    driver.engine.pool._holders[-1] += 1
    faults.in_sample = lambda requests: any(request.settings.seed == 13 for request in requests)
    for _ in range(3):
        driver.engine.run_once()
    is_dead(driver.engine)
    assert all(isinstance(driver.replies[session][-1], Failed) for session in ("a", "bad", "c"))
    assert isinstance(failed[0], ServerFault)


def test_an_engine_whose_replies_do_not_leave_is_dead(model: SpanModel) -> None:
    driver = Driver(model)

    def fail() -> None:
        raise OSError("injected")

    driver.engine.after_turn = fail
    driver.send("a", prompt(0, 20), settings=SHORT)
    for _ in range(3):
        driver.engine.run_once()
    is_dead(driver.engine)
    assert isinstance(driver.replies["a"][-1], Failed)


@each_error
def test_a_job_that_raises_is_over_and_the_next_one_is_done(model: SpanModel, error: type[Exception]) -> None:
    driver, done, failed = Driver(model), list[str](), list[CorollaError]()

    def bad() -> Iterator[None]:
        yield
        raise error("injected")

    def good() -> Iterator[None]:
        yield
        done.append("good")

    driver.engine.call(bad(), failed.append)
    driver.engine.call(good(), failed.append)
    driver.send("a", prompt(0, 20), settings=SHORT)
    driver.run()
    assert done == ["good"]
    assert [type(each) for each in failed] == [ServerFault]
    assert driver.tokens("a") == expected(model, 0)


def test_a_step_to_an_engine_that_was_stopped_is_refused(model: SpanModel) -> None:
    for started in (True, False):
        engine, replies = Engine(model, EngineConfig(cache_tokens=256)), list[Reply]()
        if started:
            engine.start()
        else:
            engine.receive(Step("early", 0, [1, 2]), replies.append)
        engine.stop()
        assert engine.failure is None
        assert all(isinstance(reply, Failed) for reply in replies)
        with pytest.raises(ServerFault, match="stopped"):
            engine.receive(Step("a", 0, [1, 2]), replies.append)


def test_the_thread_outlives_an_error_and_counts_it(model: SpanModel) -> None:
    faults, before = Faults(), unexpected["computing a batch"]
    faults.in_sample = lambda requests: any(request.settings.seed == 13 for request in requests)
    engine = Engine(model, EngineConfig(cache_tokens=1024, page_size=16), faults.parts)
    engine.start()
    try:
        for session, seed, kind in (("bad", 13, Failed), ("good", 0, Token)):
            answered = threading.Event()
            replies: list[Reply] = []

            def take(reply: Reply, replies: list[Reply] = replies, answered: threading.Event = answered) -> None:
                replies.append(reply)
                answered.set()

            engine.receive(Step(session, 0, prompt(0, 10), settings=GenerationSettings(max_tokens_to_generate=1, seed=seed)), take)
            assert answered.wait(DEADLINE)
            assert isinstance(replies[0], kind)
        assert engine.healthy
    finally:
        engine.stop()
    assert unexpected["computing a batch"] == before + 1


def test_an_engine_that_does_not_turn_while_it_has_work_is_stalled(model: SpanModel) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=256, stall_after=0.05))
    over, replies = threading.Event(), list[Reply]()

    def long() -> Iterator[None]:
        over.wait(DEADLINE)
        yield

    assert not engine.stalled
    engine.start()
    try:
        engine.call(long())
        wait_until(lambda: engine.stalled)
        assert not engine.healthy
        over.set()
        engine.receive(Step("a", 0, [1, 2]), replies.append)
        wait_until(lambda: len(replies) > 0)
        wait_until(lambda: engine.healthy)
    finally:
        over.set()
        engine.stop()
    assert replies == [Cached("a", 0, 2)]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
