from __future__ import annotations

import pytest

from corolla.errors import (
    Busy,
    CorollaError,
    DeadlineExceeded,
    InvalidSetting,
    NetworkError,
    NoRoute,
    ProtocolError,
    ServerFault,
    StorageError,
)
from corolla.swarm.bans import BanPolicy, Bans, blameworthy
from corolla.types import Span


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bans(clock: Clock) -> Bans:
    return Bans(clock, BanPolicy(shortest=2.0, longest=10.0, memory=60.0))


def test_a_ban_ends(bans: Bans, clock: Clock) -> None:
    assert bans.blame("a") == 2.0
    assert bans.banned() == {"a"}
    clock.now += 2.0
    assert bans.banned() == frozenset()


def test_bans_grow_to_a_cap(bans: Bans, clock: Clock) -> None:
    lengths = []
    for _ in range(5):
        lengths.append(bans.blame("a"))
        clock.now += lengths[-1]
    assert lengths == [2.0, 4.0, 8.0, 10.0, 10.0]
    assert bans.blame("b") == 2.0


def test_faults_during_a_ban_are_one_fault(bans: Bans, clock: Clock) -> None:
    bans.blame("a")
    clock.now += 0.5
    assert bans.blame("a") == 1.5
    clock.now += 1.5
    assert bans.banned() == frozenset()
    assert bans.blame("a") == 4.0


def test_good_work_is_rewarded_after_the_ban(bans: Bans, clock: Clock) -> None:
    bans.blame("a")
    bans.forgive("a")
    assert bans.banned() == {"a"}
    clock.now += 2.0
    bans.forgive("a")
    assert bans.blame("a") == 2.0
    bans.forgive("a stranger")


def test_old_faults_are_forgotten(bans: Bans, clock: Clock) -> None:
    bans.blame("a")
    clock.now += 62.0
    assert bans.blame("a") == 2.0


def test_what_is_left_of_a_ban(bans: Bans, clock: Clock) -> None:
    assert bans.seconds_left("a") == 0.0
    bans.blame("a")
    clock.now += 0.5
    assert bans.seconds_left("a") == 1.5
    clock.now += 2.0
    assert bans.seconds_left("a") == 0.0


def test_new_names_fill_no_memory(clock: Clock) -> None:
    bans = Bans(clock, BanPolicy(peers=3))
    for name in "abc":
        bans.blame(name)
        clock.now += 0.1
    bans.blame("d")
    assert bans.banned() == {"b", "c", "d"}


@pytest.mark.parametrize("error", [ServerFault("x"), ProtocolError("x"), NetworkError("x"), DeadlineExceeded("x")])
def test_faults_of_servers_and_networks_are_blamed(error: CorollaError) -> None:
    assert blameworthy(error)


@pytest.mark.parametrize(
    "error", [InvalidSetting("a", "b"), Busy(1.0), NoRoute((Span(0, 1),)), StorageError("x"), CorollaError("x"), ValueError("x")]
)
def test_callers_and_full_servers_are_not(error: Exception) -> None:
    assert not blameworthy(error)
