"""Which steps a server takes in, and which of them come too late."""

from __future__ import annotations

import pytest

from corolla.errors import Unauthorized
from corolla.server.node import SpanServerConfig
from corolla.server.ways import Way, Ways
from corolla.swarm.wire import CancelFrame, CloseFrame, Hop, StepFrame
from corolla.types import Span

ROUTE = (Hop("a", 0, 2), Hop("b", 2, 4))


def ways() -> Ways:
    return Ways("b", Span(2, 4), 4, SpanServerConfig(wire_dtype="float32"))


def step(ways: Ways, generation: int, session: str = "s") -> Way:
    """The first step of a generation of a client's session, as the server before sends it."""
    return ways.of_step("a", StepFrame(session, generation, 0, (5,), route=ROUTE, hop=1, client="client"), lambda way: None)


@pytest.mark.parametrize("sender", ["client", "a"])
def test_a_close_that_overtakes_the_first_step_refuses_it(sender: str) -> None:
    known = ways()
    assert not known.end(sender, CloseFrame("s", 3))
    with pytest.raises(Unauthorized, match="was closed"):
        step(known, 3)
    assert len(known) == 0
    assert step(known, 4).generation == 4


def test_a_close_without_a_generation_is_for_good() -> None:
    known = ways()
    step(known, 1)
    assert known.end("client", CloseFrame("s"))
    for generation in (1, 2, 99):
        with pytest.raises(Unauthorized):
            step(known, generation)


def test_a_close_may_overtake_a_step_of_a_session_that_is_known() -> None:
    known = ways()
    step(known, 1)
    assert known.end("client", CloseFrame("s", 2))
    with pytest.raises(Unauthorized):
        step(known, 2)
    step(known, 3)
    assert known.end("client", CloseFrame("s", 2))  # it comes late, and ends nothing
    assert len(known) == 1


def test_who_is_not_on_the_way_ends_nothing() -> None:
    known = ways()
    assert not known.end("stranger", CloseFrame("s", 3))
    assert not known.end("stranger", CancelFrame("s", 3))
    step(known, 3)
    assert not known.end("stranger", CloseFrame("s"))
    assert len(known) == 1


def test_sessions_that_never_were_push_out_none_that_were() -> None:
    known = ways()
    step(known, 1)
    known.end("client", CloseFrame("s", 1))
    for number in range(5000):
        known.end("stranger", CloseFrame(f"made up {number}", 1))
    with pytest.raises(Unauthorized):
        step(known, 1)
    assert len(known._closed_unknown._ended) == 4096
