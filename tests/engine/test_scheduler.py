"""How many rows of a prompt a forward takes."""

from __future__ import annotations

import pytest

from corolla.engine.clock import AwakeClock
from corolla.engine.pages import PagePool
from corolla.engine.scheduler import Scheduler
from corolla.engine.sequence import Conversation
from corolla.types import GenerationSettings, Span


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
    conversation = Conversation("a", pool.open(), Span(0, 2), takes_hidden=False, shares_prefixes=False, tokens=[5] * rows)
    conversation.settings, conversation.gives_hidden, conversation.deliver = GenerationSettings(), gives_hidden, print
    found = []
    while conversation.pending and len(found) < len(parts):
        ((_, work),) = scheduler.schedule([conversation]).work
        pool.advance(conversation.table, work.rows.count)
        found.append(work.rows.count)
    assert found == parts
