"""Answers under way: stopped before their turn, in the middle, and after their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from corolla.errors import Busy
from corolla.gateway.fair_queue import FairQueue, QueueConfig
from corolla.gateway.generation_tasks import GenerationRequest, TaskRunner
from corolla.gateway.metrics import Metrics
from corolla.gateway.model_registry import ServedModel, served_model
from corolla.gateway.pool import SessionPool
from corolla.types import FinishReason, GenerationSettings
from tests.gateway.running import CONTEXT, DEADLINE, TinySwarm

Work = Callable[[TaskRunner], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def model(swarm: TinySwarm) -> ServedModel:
    return served_model("tiny", swarm.directory, swarm.transport, "any", CONTEXT, swarm.records)


@asynccontextmanager
async def opened(**limits: int) -> AsyncIterator[TaskRunner]:
    tasks = TaskRunner(FairQueue(QueueConfig(**limits)), SessionPool(), Metrics())
    try:
        yield tasks
    finally:
        await asyncio.wait_for(tasks.close(), DEADLINE)


def run(work: Work, **limits: int) -> None:
    async def whole() -> None:
        async with opened(**limits) as tasks:
            await asyncio.wait_for(work(tasks), DEADLINE)

    asyncio.run(whole())


def request(model: ServedModel, tokens: int) -> GenerationRequest:
    return GenerationRequest(
        model=model, owner="a", prompt=model.tokenizer.encode("hello there"), settings=GenerationSettings(max_tokens_to_generate=tokens)
    )


def test_to_stop_what_has_ended_ends_nothing_else(model: ServedModel) -> None:
    """The session of an answer goes to the next one at once, while a slow reader is still at the first."""

    async def work(tasks: TaskRunner) -> None:
        first = tasks.begin(request(model, 3))
        known = await first.whole()
        second = tasks.begin(request(model, 200))
        await second.begun(DEADLINE)
        first.stop()
        whole = await second.whole()
        assert whole.finish_reason is FinishReason.LENGTH
        assert whole.token_ids[:3] == known.token_ids

    run(work)


def test_one_that_is_stopped_before_anything_was_done_ends(model: ServedModel) -> None:
    async def work(tasks: TaskRunner) -> None:
        answer = tasks.begin(request(model, 3))
        answer.stop()
        await answer.ended.wait()
        assert [item async for item in answer.items(1.0)] == []
        assert not tasks.under_way

    run(work)


def test_one_that_is_stopped_while_it_waits_leaves_the_queue(model: ServedModel) -> None:
    async def work(tasks: TaskRunner) -> None:
        first = tasks.begin(request(model, 300))
        await first.begun(DEADLINE)
        second = tasks.begin(request(model, 3))
        await asyncio.sleep(0)
        assert (second.place, tasks.queue.waiting) == (1, 1)
        with pytest.raises(Busy):
            tasks.begin(request(model, 3))
        second.stop()
        await second.ended.wait()
        assert tasks.queue.waiting == 0
        first.stop()
        await first.ended.wait()
        assert first.result is not None
        assert first.result.finish_reason in (None, FinishReason.LENGTH)

    run(work, streams=1, waiting=1, waiting_of_one=1)
