from __future__ import annotations

import pytest

from corolla.client.parts import Parts
from corolla.client.peers import PeerBook, Recent
from corolla.swarm.network import LocalHub


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> PeerBook:
    return PeerBook(60.0, clock)


def test_only_the_newest_are_remembered() -> None:
    recent: Recent[int] = Recent(2)
    for name, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        recent.put(name, value)
    assert recent.items() == [("a", 3), ("c", 4)]
    recent.pop("a")
    recent.pop("a")
    assert "a" not in recent


def test_new_names_fill_no_memory(book: PeerBook) -> None:
    for number in range(10_000):
        peer = str(number)
        book.hear(peer)
        book.leave(peer)
        book.fall_silent(peer)
        book.fill(peer, 1e9)
        book.doubt([peer, f"{peer} too"])
    remembered = [value for value in vars(book).values() if isinstance(value, Recent)]
    assert [len(value) for value in remembered] == [4096] * 5
    parts = Parts(LocalHub().join("client"))
    assert all(len(value) == 0 for value in vars(parts).values() if isinstance(value, Recent))


def test_who_is_avoided_and_for_how_long(book: PeerBook, clock: Clock) -> None:
    book.leave("leaving")
    book.fall_silent("silent")
    book.fill("full", 5.0)
    assert book.avoided == {"leaving", "silent", "full"}
    clock.now += 6.0
    assert book.avoided == {"leaving", "silent"}
    book.hear("silent")
    assert book.avoided == {"leaving"}
    clock.now += 60.0
    assert book.avoided == frozenset()


def test_a_leave_that_is_said_again_at_once_is_no_news(book: PeerBook, clock: Clock) -> None:
    assert book.leave("a")
    assert not book.leave("a")
    clock.now += 1.0
    assert book.leave("a")


def test_who_was_heard(book: PeerBook, clock: Clock) -> None:
    assert book.heard("a") == float("-inf")
    book.hear("a")
    assert book.heard("a") == clock.now


def test_who_is_doubted_beside_two_neighbours_is_found_out(book: PeerBook, clock: Clock) -> None:
    assert book.doubt(["a", "b"]) == []
    assert book.doubt(["a", "b"]) == []
    assert set(book.doubted) == {"a", "b"}
    clock.now += 100.0
    assert book.doubted == ()
    assert book.doubt(["b", "c"]) == ["b"]
    clock.now += 1000.0
    assert book.doubt(["a", "c"]) == []


def test_who_is_doubted_alone_again_is_found_out(book: PeerBook) -> None:
    assert book.doubt(["a"]) == []
    assert book.doubt(["a"]) == ["a"]
