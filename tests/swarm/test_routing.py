from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from corolla.errors import CapacityError, NoRoute
from corolla.messages import Hop
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import UNKNOWN_ROUND_TRIP, Route, WantedAdapter, coverage, find_route, gaps, quality
from corolla.types import Span
from tests.swarm.simulation import make_record


def route(records: Sequence[ServerRecord], **changes: Any) -> Route:
    options: dict[str, Any] = {"blocks": 12, "now": 0.0, "banned": (), "needed_tokens": 100, **changes}
    return find_route(records, **options)


def test_coverage_and_gaps() -> None:
    records = [make_record("a", 0, 5), make_record("b", 2, 6), make_record("c", 9, 11)]
    assert coverage(records, 12) == [1, 1, 2, 2, 2, 1, 0, 0, 0, 1, 1, 0]
    assert gaps(records, 12) == (Span(6, 9), Span(11, 12))
    assert gaps([], 12) == (Span(0, 12),)
    assert gaps([make_record("a", 0, 12)], 12) == ()


def test_one_server_of_everything() -> None:
    record = make_record("a", 0, 12, throughput=1200.0)
    assert route([record]) == Route((Hop("a", 0, 12),), pytest.approx(0.01), quality(record))


def test_a_server_is_entered_and_left_inside_its_span() -> None:
    records = [
        make_record("slow", 0, 12, throughput=1.0, round_trips={"a": 0.01}),
        make_record("a", 2, 7, round_trips={"b": 0.01}),
        make_record("b", 5, 11, throughput=2000.0, round_trips={"slow": 0.01}),
    ]
    found = route(records[:1] + records[1:] + [make_record("first", 0, 4), make_record("last", 9, 12)])
    assert found.hops == (Hop("first", 0, 4), Hop("a", 4, 5), Hop("b", 5, 11), Hop("last", 11, 12))


def test_the_way_back_to_the_first_server_counts() -> None:
    firsts = [make_record("near", 0, 6, round_trips={"end": 0.01}), make_record("far", 0, 6, round_trips={"end": 0.005})]
    end = make_record("end", 6, 12, round_trips={"near": 0.01, "far": 0.5})
    assert route([*firsts, end]).peers == ("near", "end")
    assert route([*firsts, end]).seconds == pytest.approx(0.012 + 0.01)


def test_load_and_throughput_count() -> None:
    records = [make_record("busy", 0, 12, throughput=3000.0, active=5), make_record("idle", 0, 12, throughput=1000.0)]
    assert route(records).peers == ("idle",)


def test_rows_make_computing_count_more_than_distance() -> None:
    split = [make_record("a", 0, 6, throughput=9000.0), make_record("b", 6, 12, throughput=9000.0)]
    whole = make_record("whole", 0, 12, throughput=1000.0)
    assert route([*split, whole]).peers == ("whole",)
    assert route([*split, whole], rows=512).peers == ("a", "b")


def test_the_client_prefers_what_is_near_to_it() -> None:
    records = [make_record("a", 0, 12), make_record("b", 0, 12)]
    assert route(records).peers == ("a",)
    assert route(records, prefer={"b": 0.01}).peers == ("b",)


def test_a_round_trip_measured_by_either_side_is_known() -> None:
    records = [make_record("a", 0, 6), make_record("b", 6, 12, round_trips={"a": 0.002})]
    assert route(records).seconds == pytest.approx(0.012 + 0.002)
    unknown = [make_record("a", 0, 6), make_record("b", 6, 12)]
    assert route(unknown).seconds == pytest.approx(0.012 + UNKNOWN_ROUND_TRIP)


@pytest.mark.parametrize(
    "change", [{"state": "joining"}, {"state": "draining"}, {"expires": 5.0}, {"free_tokens": 99}, {"throughput": 0.0}, {"blocks": 24}]
)
def test_servers_that_cannot_take_a_session_are_no_way(change: dict[str, Any]) -> None:
    records = [make_record("a", 0, 8), make_record("b", 8, 12, **change)]
    with pytest.raises(NoRoute, match="8:12") as caught:
        route(records, now=10.0)
    assert caught.value.missing == (Span(8, 12),)
    assert isinstance(caught.value, CapacityError)


def test_banned_peers_are_gone_around() -> None:
    records = [make_record("a", 0, 12), make_record("b", 0, 12)]
    assert route(records, banned={"a"}).peers == ("b",)
    with pytest.raises(NoRoute, match="0:12"):
        route(records, banned={"a", "b"})


def test_a_session_stays_where_it_is_held() -> None:
    record = make_record("a", 0, 12, state="draining", free_tokens=0)
    assert route([record], holding=["a"]).peers == ("a",)
    with pytest.raises(NoRoute):
        route([make_record("a", 0, 12, state="joining")], holding=["a"])


def test_qualities_do_not_mix_unless_allowed() -> None:
    records = [make_record("a", 0, 8, weights="int8"), make_record("b", 6, 12), make_record("c", 8, 12, weights="int8", dtype="bfloat16")]
    with pytest.raises(NoRoute) as caught:
        route(records)
    assert caught.value.missing == (Span(8, 12),)
    assert route(records, mixed=True).peers == ("a", "b")


def test_a_certain_quality_can_be_asked_for() -> None:
    records = [make_record("a", 0, 12, throughput=9.0), make_record("b", 0, 12, weights="int8")]
    quickest, other = route(records), quality(records[0])
    assert (quickest.peers, quickest.quality) == (("b",), quality(records[1]))
    assert route(records, like=other).peers == ("a",)
    assert route(records[1:], like=other).peers == ("b",)  # better another one than none


def test_two_fine_tunes_of_one_configuration_never_mix() -> None:
    records = [make_record("a", 0, 6), make_record("b", 6, 12, checkpoint="another")]
    for mixed in (False, True):
        with pytest.raises(NoRoute):
            route(records, mixed=mixed)


def test_an_adapter_is_served_where_it_is_held_or_taken() -> None:
    records = [
        make_record("plain", 0, 12, throughput=1e6, adapters={"poet": "other"}),
        make_record("holds", 0, 6, adapters={"poet": "wanted"}),
        make_record("takes", 6, 12, takes_adapters=True),
    ]
    brought = route(records, adapter=WantedAdapter("wanted", brought=True))
    assert (brought.peers, brought.lacking) == (("holds", "takes"), {"takes"})
    assert route(records).peers == ("plain",)
    with pytest.raises(NoRoute, match="blocks 6:12 with the adapter wanted"):
        route(records, adapter=WantedAdapter("wanted", brought=False))


def test_ties_go_to_the_lowest_peers_in_any_order_of_the_records() -> None:
    records = [make_record(peer, *span) for peer, span in zip("abcdef", [(0, 6), (6, 12)] * 3, strict=True)]
    for order in itertools.permutations(records):
        assert route(order).peers == ("a", "b")


def test_no_server_is_entered_twice() -> None:
    links = {"fast": 0.0, "wide": 0.0}
    wide = make_record("wide", 0, 12, throughput=10.0, round_trips=links)
    fast = make_record("fast", 3, 9, throughput=1000.0, round_trips=links)
    assert route([wide, fast]).peers == ("wide",)


def test_absurd_claims_break_nothing() -> None:
    records = [make_record("a", 0, 6, throughput=5e-324, active=2**53), make_record("b", 6, 12, round_trips={"a": 1e308, "x": 0.0})]
    assert route(records, rows=4096).peers == ("a", "b")


@pytest.mark.parametrize("seed", range(30))
def test_no_route_is_quicker_than_the_one_found(seed: int) -> None:
    generator = random.Random(seed)
    records = []
    for peer in "abcdefg":
        start = generator.randrange(0, 4)
        known = {other: generator.uniform(0, 0.2) for other in "abcdefg" if generator.random() < 0.6}
        end = generator.randrange(start + 1, 6)
        records.append(make_record(peer, start, end, blocks=5, throughput=generator.uniform(5, 100), round_trips=known))
    prefer = {peer: generator.uniform(0, 1) for peer in "abc"}
    # Every choice of a server for each block, as long as none is entered twice; each priced as a swarm of its own.
    everything = []
    for choice in itertools.product(*[[r for r in records if r.start <= block < r.end] for block in range(5)]):
        hops = [(record, len(list(run))) for record, run in itertools.groupby(choice)]
        if len({record.peer for record, _ in hops}) == len(hops):
            everything.append(price(hops, prefer))
    if not everything:
        with pytest.raises(NoRoute):
            route(records, blocks=5, prefer=prefer)
    else:
        found = route(records, blocks=5, prefer=prefer)
        assert found.seconds == pytest.approx(min(everything)), f"seed {seed}"


def price(hops: list[tuple[ServerRecord, int]], prefer: dict[str, float]) -> float:
    computing = sum(used / record.throughput for record, used in hops)
    ring = [record for record, _ in hops]
    passing = 0.0
    for one, other in zip(ring, ring[1:] + ring[:1], strict=True):
        if one is not other:
            passing += one.round_trips.get(other.peer, other.round_trips.get(one.peer, UNKNOWN_ROUND_TRIP)) / 2
    client = sum(prefer.get(record.peer, UNKNOWN_ROUND_TRIP) / 2 for record in (ring[0], ring[-1]))
    return computing + passing + client / 64


def test_proven_servers_go_before_those_that_only_claim() -> None:
    quick = make_record("liar", 0, 12, throughput=1e12)
    slow = [make_record("a", 0, 6, throughput=1.0), make_record("b", 6, 12, throughput=1.0)]
    assert route([quick, *slow]).peers == ("liar",)
    assert route([quick, *slow], proven={"a", "b"}).peers == ("a", "b")
    assert route([quick, *slow], proven={"a"}).peers == ("a", "liar")  # for the blocks that no proven one holds
    assert route([quick, *slow], proven=()).peers == ("liar",)  # a swarm works from its first second
    assert route([quick, *slow], proven={"a", "b"}).seconds == route(slow).seconds


def test_a_quality_that_is_proven_goes_before_one_that_is_not() -> None:
    records = [make_record("a", 0, 12, throughput=1.0), make_record("liar", 0, 12, weights="int8", throughput=1e12)]
    assert route(records, proven={"a"}).peers == ("a",)
    assert route(records, proven={"a"}, like=quality(records[1])).peers == ("liar",)
