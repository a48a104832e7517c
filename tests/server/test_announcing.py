from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from corolla.errors import InvalidSetting, NetworkError
from corolla.server.announcing import NEIGHBOURS, Announcer, nearest, next_servers, to_ask
from corolla.swarm.directory import LocalDirectory
from corolla.swarm.network import LocalHub
from corolla.swarm.records import ServerRecord
from tests.server.local_peer import LocalPeer
from tests.swarm.simulation import make_record

DEADLINE = 30.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def peer() -> LocalPeer:
    return LocalPeer(LocalHub(), LocalDirectory(), "a")


def describe() -> ServerRecord:
    return make_record("a", 0, 4, expires=time.time() + 15)


def test_it_announces_again_and_again_until_it_is_withdrawn(peer: LocalPeer) -> None:
    announcer = Announcer(peer, describe, every=0.01)
    until(lambda: len(peer.published) > 3)
    announcer.withdraw()
    assert peer.servers() == []
    said = len(peer.published)
    announcer.now()
    announcer.withdraw()
    assert len(peer.published) == said


def test_a_change_is_announced_at_once(peer: LocalPeer) -> None:
    announcer = Announcer(peer, describe, every=1000.0)
    announcer.now()
    assert len(peer.published) == 2
    announcer.withdraw()


def test_an_announcement_that_does_not_go_out_is_repeated(peer: LocalPeer) -> None:
    announcer = Announcer(peer, describe, every=0.01)
    peer.cut_off = True
    announcer.now()
    said = len(peer.published)
    peer.cut_off = False
    until(lambda: len(peer.published) > said)
    peer.cut_off = True
    announcer.withdraw()  # it expires by itself


def test_a_server_that_cannot_announce_itself_at_all_says_so(peer: LocalPeer) -> None:
    peer.cut_off = True
    with pytest.raises(NetworkError):
        Announcer(peer, describe, every=0.01)


def test_rows_go_on_to_who_holds_a_block_behind() -> None:
    others = [
        make_record("before", 0, 5),  # of 4:8, it holds only block 4, which nothing comes before here
        make_record("inside", 5, 6),
        make_record("over", 0, 12),
        make_record("behind", 8, 12),
        make_record("far", 9, 12),
        make_record("other model", 8, 12, blocks=24),
    ]
    me = make_record("me", 4, 8)
    assert next_servers([*others, me], me) == ["inside", "over", "behind"]
    head = make_record("me", 8, 12)
    assert next_servers([*others, head], head) == ["before", "over", "behind", "far"]


def test_the_nearest_are_announced() -> None:
    round_trips = {f"p{number}": number / 1000 for number in range(30)} | {"stranger": 0.0}
    found = nearest([f"p{number}" for number in range(40)], round_trips)
    assert found == {f"p{number}": number / 1000 for number in range(NEIGHBOURS)}


def test_the_nearest_are_asked_and_some_by_chance() -> None:
    peers = [f"p{number:02}" for number in range(40)]
    assert sorted(to_ask(peers[:5], {}, random.Random(0))) == peers[:5]
    round_trips = {peer: float(number) for number, peer in enumerate(peers)}
    chance, asked = random.Random(0), set()
    for _ in range(100):
        now = to_ask(peers, round_trips, chance)
        assert len(set(now)) == NEIGHBOURS
        assert set(peers[:12]) <= set(now)
        asked |= set(now)
    assert asked == set(peers)


def failing_once(peer: LocalPeer, error: Exception) -> Callable[[], ServerRecord]:
    """What `describe` gives; the third time it raises."""

    def describe_or_fail() -> ServerRecord:
        asked.append(1)
        if len(asked) == 3:
            raise error
        return describe()

    asked: list[int] = []
    return describe_or_fail


@pytest.mark.parametrize("error", [InvalidSetting("expires", "a clock was stepped"), KeyError("never seen"), OSError("disk")], ids=repr)
def test_no_error_ends_the_announcements(peer: LocalPeer, error: Exception) -> None:
    announcer = Announcer(peer, failing_once(peer, error), every=0.01)
    until(lambda: len(peer.published) > 5)
    announcer.withdraw()


def test_a_clock_that_was_stepped_recovers_by_itself() -> None:
    skew = [0.0]
    peer = LocalPeer(LocalHub(), LocalDirectory(clock=lambda: time.time() + skew[0]), "a")
    announcer = Announcer(peer, describe, every=0.01)
    for stepped in (3600.0, -3600.0):
        skew[0] = stepped
        said = len(peer.published)
        until(lambda said=said: len(peer.published) > said + 3)  # type: ignore[misc]
        assert (peer.servers() == []) is (stepped > 0)
        skew[0] = 0.0
        until(peer.servers)
    announcer.withdraw()
