from __future__ import annotations

import time
from collections.abc import Callable

from corolla.barrier import unexpected
from corolla.server.health import HealthWatch

DEADLINE = 30.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_first_reason_is_kept_and_told_once() -> None:
    reasons, told = [None, None, "the engine ended", "later"], list[str]()
    watch = HealthWatch(lambda: reasons.pop(0), told.append, every=0.005)
    until(lambda: told)
    assert (watch.failure, told, reasons) == ("the engine ended", ["the engine ended"], ["later"])


def test_an_error_of_a_look_ends_no_watch() -> None:
    looks: list[int] = []

    def look() -> str | None:
        looks.append(1)
        if len(looks) < 3:
            raise KeyError("never seen")
        return "dead" if len(looks) > 5 else None

    before = unexpected["the health watch"]
    watch = HealthWatch(look, lambda failure: None, every=0.005)
    until(lambda: watch.failure == "dead")
    assert unexpected["the health watch"] == before + 2


def test_nobody_looks_after_the_end() -> None:
    looks: list[int] = []
    watch = HealthWatch(lambda: looks.append(1), lambda failure: None, every=0.005)
    until(lambda: looks)
    watch.end()
    until(lambda: not watch.alive)
    assert watch.failure is None
