from __future__ import annotations

import random
from typing import Any

import pytest

from corolla.errors import InvalidSetting
from corolla.swarm.placement import MovePolicy, Mover, choose_span, mended, should_move, strengths
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import gaps
from corolla.types import Span
from tests.swarm.simulation import make_record


def servers(*spans: tuple[int, int], **changes: Any) -> list[ServerRecord]:
    return [make_record(f"p{number}", *span, **changes) for number, span in enumerate(spans)]


def choose(records: list[ServerRecord], capacity: int) -> Span:
    return choose_span(records, blocks=12, capacity=capacity, throughput=1000.0)


def move(records: list[ServerRecord], which: int, **changes: Any) -> Span | None:
    me = records[which]
    return should_move(records, me, **{"now": 0.0, "capacity": len(me.span), **changes})


def test_a_server_splits_itself_over_its_span() -> None:
    assert strengths([make_record("a", 0, 4), make_record("b", 2, 4)], 5) == [250, 250, 750, 750, 0]


@pytest.mark.parametrize(
    ("spans", "capacity", "chosen"),
    [
        ([], 4, (0, 4)),
        ([], 99, (0, 12)),
        ([(0, 4)], 4, (4, 8)),  # the first of equal gaps
        ([(0, 6), (10, 12)], 4, (6, 10)),  # the whole gap
        ([(0, 6), (6, 12), (0, 6)], 6, (6, 12)),
        ([(0, 6), (6, 12), (0, 6), (8, 12)], 4, (4, 8)),
    ],
)
def test_a_newcomer_takes_the_weakest_window(spans: list[tuple[int, int]], capacity: int, chosen: tuple[int, int]) -> None:
    assert choose(servers(*spans), capacity) == Span(*chosen)


def test_a_slow_holder_attracts_help_and_a_draining_one_counts_as_gone() -> None:
    slow = [make_record("a", 0, 6), make_record("b", 6, 12, throughput=10.0)]
    assert choose(slow, 6) == Span(6, 12)
    leaving = [make_record("a", 0, 6, state="draining", throughput=9000.0), make_record("b", 6, 12)]
    assert choose(leaving, 6) == Span(0, 6)
    coming = [make_record("a", 0, 6, state="joining"), make_record("b", 6, 12, throughput=0.0)]
    assert choose(coming, 6) == Span(6, 12)


def test_the_order_of_records_does_not_matter() -> None:
    records = [make_record(f"p{n}", n % 9, n % 9 + 3, throughput=0.1 * 1.7**n) for n in range(20)]
    assert choose(records, 3) == choose(records[::-1], 3)


def test_no_capacity_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="at least one block"):
        choose([], 0)


def test_a_server_moves_to_a_gap() -> None:
    records = servers((0, 6), (0, 6))
    assert move(records, 0) == move(records, 1) == Span(6, 12)


def test_a_gap_is_not_closed_by_opening_as_large_a_one() -> None:
    assert move(servers((0, 6)), 0) is None
    assert move(servers((0, 4), (4, 8)), 1) is None


def test_a_server_shifts_when_that_closes_a_gap() -> None:
    assert move(servers((0, 6), (4, 10)), 1) == Span(6, 12)


@pytest.mark.parametrize(
    ("spans", "mended_spans"),
    [
        ([(1, 4), (4, 7), (7, 10), (7, 10)], [(0, 3), (3, 6), (6, 9), (9, 12)]),  # from the left
        ([(0, 4), (1, 5), (5, 9)], [(0, 4), (4, 8), (8, 12)]),  # from the right
        ([(0, 6), (6, 12), (3, 7)], [(0, 6), (6, 12), (3, 7)]),
        ([(0, 6), (6, 11)], []),
    ],
)
def test_spans_shift_along_until_they_hold_every_block(spans: list[tuple[int, int]], mended_spans: list[tuple[int, int]]) -> None:
    assert list(mended(servers(*spans), 12).values()) == [Span(*span) for span in mended_spans]


@pytest.mark.parametrize("seed", range(30))
def test_a_cut_swarm_whose_spans_are_long_enough_mends(seed: int) -> None:
    generator = random.Random(seed)
    spans: list[tuple[int, int]] = []
    while sum(end - start for start, end in spans) < 12:
        length = generator.randint(1, 6)
        start = generator.randint(0, 12 - length)
        spans.append((start, start + length))
    records = servers(*spans)
    for _ in range(20 * len(records)):
        which = generator.randrange(len(records))
        target = move(records, which)
        if target is not None:
            records[which] = make_record(records[which].peer, target.start, target.end)
    assert not gaps(records, 12), f"seed {seed}: {records}"


def test_servers_of_another_quality_do_not_count() -> None:
    others = [make_record("a", 6, 12, weights="int8"), make_record("b", 0, 6)]
    assert move([make_record("me", 0, 6), *others], 0) == Span(6, 12)


def test_a_server_moves_only_where_it_helps_enough() -> None:
    assert move(servers((0, 6), (0, 6), (6, 12)), 0) is None
    four = servers((0, 6), (0, 6), (0, 6), (6, 12))
    assert move(four, 0) == Span(6, 12)
    assert move(four, 0, factor=2.1) is None
    assert move(four, 3) is None


def test_the_last_ready_holder_stays() -> None:
    weak = make_record("weak", 6, 12, throughput=10.0)
    assert move([make_record("a", 0, 6), make_record("b", 0, 6), weak], 0) == Span(6, 12)
    assert move([make_record("a", 0, 6), make_record("b", 0, 6, state="joining"), weak], 0) is None
    assert move([make_record("a", 0, 6), make_record("b", 0, 6, state="draining"), weak], 0) is None
    assert move([make_record("a", 0, 6), make_record("b", 0, 6, expires=1.0), weak], 0, now=2.0) is None


def test_what_a_draining_server_holds_is_taken_over_ahead_by_who_can_be_spared() -> None:
    leaving = make_record("leaving", 6, 12, state="draining")
    assert move([make_record("a", 0, 6), make_record("b", 0, 6), leaving], 0) == Span(6, 12)
    assert move([make_record("a", 3, 9), make_record("b", 0, 5), leaving], 0) is None


def test_a_draining_server_goes_when_no_step_is_under_way() -> None:
    others = servers((0, 6), (0, 6), (6, 12))
    me = make_record("me", 0, 6, state="draining")
    assert should_move([*others, me], me, now=0.0, capacity=6) == Span(6, 12)
    busy = make_record("me", 0, 6, state="draining", active=1)
    assert should_move([*others, busy], busy, now=0.0, capacity=6) is None


def test_of_servers_that_drain_for_the_same_gap_one_goes() -> None:
    both = servers((0, 6), (0, 6), state="draining")
    assert move(both, 0) == Span(6, 12)
    assert move(both, 1) is None
    assert move([both[0], make_record("p1", 0, 6)], 1) == Span(6, 12)  # this one does not go yet
    apart = [make_record("p0", 1, 7, state="draining"), make_record("p1", 5, 11, state="draining")]
    assert [move(apart, 0), move(apart, 1)] == [Span(0, 6), Span(6, 12)]


def test_a_mover_waits_drains_and_moves() -> None:
    mover = Mover(1, MovePolicy(pace=10.0, settle=5.0))
    records = servers((0, 6), (0, 6))
    ready, draining = records[0], make_record("p0", 0, 6, state="draining")
    times = [now for now in range(100) if mover.draining or mover.consider(records, ready, now=float(now), capacity=6) or mover.draining]
    began = times[0]
    assert 0 < began <= 20
    assert mover.consider(records, draining, now=began + 4.0, capacity=6) is None
    busy = make_record("p0", 0, 6, state="draining", active=1)
    assert mover.consider(records, busy, now=began + 6.0, capacity=6) is None
    assert mover.draining
    assert mover.consider(records, draining, now=began + 7.0, capacity=6) == Span(6, 12)
    assert not mover.draining


def test_a_mover_stays_when_somebody_else_was_first() -> None:
    mover = Mover(1, MovePolicy(pace=0.0, settle=5.0))
    records = servers((0, 6), (0, 6))
    mover.consider(records, records[0], now=0.0, capacity=6)
    mover.consider(records, records[0], now=1.0, capacity=6)
    assert mover.draining
    moved = [records[0], make_record("p1", 6, 12, state="joining")]
    assert mover.consider(moved, make_record("p0", 0, 6, state="draining"), now=9.0, capacity=6) is None
    assert not mover.draining


def test_movers_of_different_seeds_wait_differently() -> None:
    records = servers(*[(0, 6)] * 8)
    began = set()
    for seed in range(8):
        mover = Mover(seed)
        began.add(next(now for now in range(1000) if mover.consider(records, records[0], now=float(now), capacity=6) or mover.draining))
    assert len(began) > 4
