from __future__ import annotations

import logging

import pytest

from corolla.errors import NetworkError
from corolla.swarm.limits import Rate, Room, Sparing


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def test_a_second_s_worth_goes_at_once_and_then_the_rate() -> None:
    clock = Clock()
    rate = Rate(10.0, clock)
    assert [rate.take() for _ in range(10)] == [0.0] * 10
    assert rate.take() == pytest.approx(0.1)
    assert rate.take() == pytest.approx(0.2)
    clock.now += 0.2
    assert rate.take() == pytest.approx(0.1)


def test_who_rests_saves_up_no_more_than_a_second_s_worth() -> None:
    clock = Clock()
    rate = Rate(10.0, clock)
    clock.now += 1000
    assert [rate.take() for _ in range(10)] == [0.0] * 10
    assert rate.take() > 0


def test_room_is_bounded_for_each_and_for_all() -> None:
    room = Room(each=100, total=150)
    room.take("a", 60)
    with pytest.raises(NetworkError, match="more than 100 bytes of it"):
        room.take("a", 41)
    room.take("a", 40)
    with pytest.raises(NetworkError, match="of all peers"):
        room.take("b", 51)
    assert room.held == 100
    room.give("a", 100)
    room.take("b", 100)
    assert room.held == 100


def test_the_log_is_spared_of_lines_that_strangers_repeat(caplog: pytest.LogCaptureFixture) -> None:
    clock, log = Clock(), logging.getLogger("tests.sparing")
    log.addFilter(sparing := Sparing(burst=3, clock=clock))
    for number in range(50):
        log.warning("refused %d", number)
    log.warning("another kind")
    clock.now += 1
    log.warning("refused %d", 50)
    log.removeFilter(sparing)
    said = [entry.getMessage() for entry in caplog.records]
    assert said == ["refused 0", "refused 1", "refused 2", "another kind", "refused 50 (47 more of this kind were left out)"]


def test_a_burst_goes_at_once_and_several_are_taken_together() -> None:
    rate = Rate(10.0, Clock(), burst=40.0)
    assert rate.take(40) == 0.0
    assert rate.spent
    assert rate.take(10) == pytest.approx(1.0)
