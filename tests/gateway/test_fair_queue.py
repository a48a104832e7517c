"""Places, turns and rates."""

from __future__ import annotations

import asyncio

import pytest

from corolla.errors import Busy, RateLimited
from corolla.gateway.fair_queue import FairQueue, QueueConfig, Rates


def test_callers_take_turns_whoever_asked_more() -> None:
    async def work() -> list[str]:
        queue = FairQueue(QueueConfig(streams=1, waiting=20, waiting_of_one=20))
        order: list[str] = []

        async def ask(caller: str) -> None:
            async with queue.place(caller):
                order.append(caller)
                await asyncio.sleep(0)

        await asyncio.gather(*(ask(caller) for caller in ["greedy"] * 6 + ["modest"] * 2))
        assert (queue.active, queue.waiting) == (0, 0)
        return order

    assert asyncio.run(work())[:5] == ["greedy", "greedy", "modest", "greedy", "modest"]


def test_queues_are_bounded_and_who_leaves_one_is_forgotten() -> None:
    async def work() -> None:
        queue = FairQueue(QueueConfig(streams=1, waiting=3, waiting_of_one=2))
        await queue.take("a")
        waiting = [asyncio.create_task(queue.take(caller)) for caller in ("a", "a", "b")]
        await asyncio.sleep(0)
        for caller in ("a", "c"):
            with pytest.raises(Busy):
                await queue.take(caller)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert queue.waiting == 2
        queue.leave("a")
        waiting[2].cancel()  # its turn has come, and it is gone
        await asyncio.gather(*waiting, return_exceptions=True)
        assert queue.active == 1
        queue.leave("a")
        assert (queue.active, queue.waiting) == (0, 0)

    asyncio.run(work())


def test_a_rate_fills_up_again() -> None:
    now = [0.0]
    rates = Rates(lambda: now[0])
    for _ in range(2):
        rates.check("a", 2)
    with pytest.raises(RateLimited) as raised:
        rates.check("a", 2)
    rates.check("b", 2)
    now[0] += raised.value.retry_after
    rates.check("a", 2)
    rates.check("a", None)
