from __future__ import annotations

import pytest

from corolla.client.deadline import Deadline, Pauses


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_look_that_comes_far_too_late_is_a_pause(clock: Clock) -> None:
    pauses = Pauses(0.5, clock)
    looks = []
    for passed in (0.5, 1.9, 0.0, 30.0, 0.5):
        clock.now += passed
        looks.append(pauses.look())
    assert looks == pytest.approx([0.0, 1.9, 0.0, 30.0, 0.0])


def test_a_pause_is_remembered_for_a_while(clock: Clock) -> None:
    pauses = Pauses(0.5, clock)
    assert not pauses.ended_within(10.0)
    clock.now += 30.0
    assert pauses.ended_within(10.0)  # before any look
    pauses.look()
    clock.now += 0.5
    assert pauses.look() == 0.0
    assert pauses.ended_within(10.0)
    assert not pauses.ended_within(0.25)


def test_a_deadline_comes_later_by_what_this_process_stood_still(clock: Clock) -> None:
    deadline = Deadline(5.0, clock)
    clock.now += 1.0
    assert deadline.look() == 4.0
    clock.now += 101.0
    assert deadline.look() == 4.0
    for _ in range(4):
        clock.now += 1.0
        left = deadline.look()
    assert left == 0.0
    deadline.restart()
    assert deadline.look() == 5.0
