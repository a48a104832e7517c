"""Teams of OpenMP threads: what is computed on a thread that ends leaves none."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from corolla.engine.threads import GoOn, on_passing_thread

LARGE = 1_000_000  # values; torch spreads an operation on as many over its threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_what_it_returns() -> None:
    assert on_passing_thread(lambda go_on: threading.current_thread().name) == "corolla-passing"


def test_what_it_raises() -> None:
    with pytest.raises(ValueError, match="of the work"):
        on_passing_thread(lambda go_on: int("of the work"))


def test_who_interrupts_waits_for_its_end() -> None:
    began, ended = threading.Event(), threading.Event()

    def work(go_on: GoOn) -> None:
        began.set()
        try:
            while True:
                go_on()
        finally:
            ended.set()

    def interrupt() -> None:
        began.wait()
        os.kill(os.getpid(), signal.SIGINT)  # to the process, as a terminal does

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        on_passing_thread(work)
    assert ended.is_set()


def test_no_thread_is_left() -> None:
    before = threads()
    during = on_passing_thread(lambda go_on: (torch.ones(LARGE).exp(), threads())[1])
    assert len(during - before) >= 2, "the work had no team, so nothing is shown"
    deadline = time.monotonic() + 5.0
    while threads() & during - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads() & during - before


def threads() -> set[int]:
    """This process's by id: those of other tests may end meanwhile."""
    return {thread.id for thread in psutil.Process().threads()}
