"""Which steps a server takes in, and which of them come too late."""

from __future__ import annotations

import pytest

from corolla.errors import Busy
from corolla.messages import Cancel, Close, Hop, StepFrame
from corolla.server.session_table import SessionRoute, SessionTable, SpanServerConfig
from corolla.types import Span

ROUTE = (Hop("a", 0, 2), Hop("b", 2, 4))


def ways() -> SessionTable:
    return SessionTable("b", Span(2, 4), 4, SpanServerConfig(wire_dtype="float32"))


def step(ways: SessionTable, generation: int, session: str = "s") -> SessionRoute | None:
    """The first step of a generation of a client's session, as the server before sends it. None where it is dropped."""
    return ways.of_step("a", StepFrame(session, generation, 0, (5,), route=ROUTE, hop=1, client="client"), lambda way: None)


@pytest.mark.parametrize("sender", ["client", "a"])
@pytest.mark.parametrize("kind", [Close, Cancel])
def test_what_ends_a_generation_before_its_first_step_came_ends_it(sender: str, kind: type[Close | Cancel]) -> None:
    known = ways()
    assert not known.end(sender, kind("s", 3))
    assert step(known, 3) is None
    assert len(known) == 0
    assert step(known, 4) is known.get("s")


def test_a_cancelled_generation_takes_no_step_any_more() -> None:
    known = ways()
    way = step(known, 1)
    assert way is not None
    way.take(StepFrame("s", 1, 0, (5,)))
    assert known.end("client", Cancel("s", 1))
    assert known.of_step("a", StepFrame("s", 1, 1, (6,)), lambda way: None) is None
    assert step(known, 1) is None
    assert step(known, 2) is not None


def test_a_cancel_of_the_next_generation_is_remembered_with_the_session() -> None:
    known = ways()
    step(known, 1)
    assert known.end("client", Cancel("s", 2))
    assert step(known, 2) is None
    assert step(known, 3) is not None


def test_a_step_that_comes_again_or_too_late_is_dropped() -> None:
    known = ways()
    way = step(known, 1)
    assert way is not None
    way.take(StepFrame("s", 1, 0, (5,)))
    assert step(known, 1) is None
    later = known.of_step("a", StepFrame("s", 1, 1, (6, 7), drafts=1), lambda way: None)
    assert later is way
    way.take(StepFrame("s", 1, 1, (6, 7), drafts=1))
    assert known.of_step("a", StepFrame("s", 1, 1, (6,)), lambda way: None) is None
    assert known.of_step("a", StepFrame("s", 0, 9, (6,)), lambda way: None) is None


def test_a_refused_step_ends_its_generation() -> None:
    known = ways()
    first = step(known, 1)
    assert first is not None
    known.refuse("s", first, new=True)
    assert len(known) == 0
    assert step(known, 1) is None
    second = step(known, 2)
    assert second is not None
    known.refuse("s", second, new=False)
    assert step(known, 2) is None
    assert len(known) == 1


def test_the_first_server_stamps_when_an_answer_was_asked_for() -> None:
    first = SessionTable("a", Span(0, 2), 4, SpanServerConfig(wire_dtype="float32"), wall_clock=iter((1000.0, 1001.0, 1002.0)).__next__)

    def asked(generation: int, claimed: int) -> int:
        way = first.of_step("client", StepFrame("s", generation, 0, (5,), route=ROUTE, client="client", asked=claimed), lambda way: None)
        assert way is not None
        return way.asked

    assert asked(1, claimed=1) == 1_000_000
    assert asked(2, claimed=1) == 1_000_000  # the same answer, sent again
    assert asked(3, claimed=2) == 1_002_000


def test_a_later_server_believes_a_stamp_of_the_last_minutes() -> None:
    later = SessionTable("b", Span(2, 4), 4, SpanServerConfig(wire_dtype="float32"), wall_clock=lambda: 1000.0)
    for session, claimed, believed in (("s", 1, 880_000), ("t", 990_000, 990_000)):
        way = later.of_step("a", StepFrame(session, 1, 0, (5,), route=ROUTE, hop=1, client="client", asked=claimed), lambda way: None)
        assert way is not None
        assert way.asked == believed


def test_places_are_counted_by_client_and_given_back() -> None:
    known = SessionTable("b", Span(2, 4), 4, SpanServerConfig(wire_dtype="float32", sessions_per_client=2))
    step(known, 1, "s")
    step(known, 1, "t")
    with pytest.raises(Busy):
        step(known, 1, "u")
    step(known, 2, "t")
    known.end("client", Close("t"))
    assert step(known, 1, "u") is not None
    known.lose("client")
    assert len(known) == 0
    assert not known._of_client
    assert not known._of_sender


def test_sessions_of_a_lost_server_before_are_forgotten_whoever_it_named_as_their_client() -> None:
    known = ways()
    known.of_step("a", StepFrame("s", 1, 0, (5,), route=ROUTE, hop=1, client="b"), lambda way: None)
    gone, parted = known.lose("a")
    assert [session for session, _ in gone] == [session for session, _ in parted] == ["s"]
    assert len(known) == 0


def test_sessions_that_were_not_used_for_long_are_found() -> None:
    now = [0.0]
    known = SessionTable("b", Span(2, 4), 4, SpanServerConfig(wire_dtype="float32", idle=600.0), clock=lambda: now[0])
    step(known, 1, "s")
    now[0] = 500.0
    step(known, 1, "t")
    assert not list(known.unused())
    now[0] = 700.0
    assert [session for session, _ in known.unused()] == ["s"]


def test_a_close_without_a_generation_is_for_good() -> None:
    known = ways()
    step(known, 1)
    assert known.end("client", Close("s"))
    assert [step(known, generation) for generation in (1, 2, 99)] == [None] * 3


def test_only_the_client_closes_for_good() -> None:
    known = ways()
    assert not known.end("a", Close("s"))
    assert step(known, 1) is not None
    assert not known.end("a", Close("s"))
    assert len(known) == 1


def test_a_close_may_overtake_a_step_of_a_session_that_is_known() -> None:
    known = ways()
    step(known, 1)
    assert known.end("client", Close("s", 2))
    assert step(known, 2) is None
    step(known, 3)
    assert known.end("client", Close("s", 2))  # it comes late, and ends nothing
    assert len(known) == 1


def test_who_is_not_on_the_way_ends_nothing() -> None:
    known = ways()
    assert not known.end("stranger", Close("s", 3))
    assert not known.end("stranger", Cancel("s", 3))
    step(known, 3)
    assert not known.end("stranger", Close("s"))
    assert len(known) == 1


def test_sessions_that_never_were_push_out_none_that_were() -> None:
    known = ways()
    step(known, 1)
    known.end("client", Close("s", 1))
    for number in range(5000):
        known.end("stranger", Close(f"made up {number}", 1))
    assert step(known, 1) is None
    assert len(known._over_unknown) == 4096
