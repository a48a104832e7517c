"""Where what is heavy is computed, so that the engine's thread is the only one of its process that keeps others to help it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def on_passing_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises, called on a thread that ends with it.

    torch's products run on teams of OpenMP threads, one team for each thread that ever called one, which live as long as it does.
    GNU OpenMP lets none of them spin between two products once all together are more than the machine's cores: each product
    is then slept and woken for, and a token of SmolLM2 on two cores took 43 ms instead of 26. So what is computed before an
    engine runs, its weights above all, leaves no team behind.

    Where the caller is interrupted while it waits, the thread goes on to its own end.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again on the caller's thread)
            raised.append(error)

    thread = threading.Thread(target=run, name="corolla-passing", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return returned[0]
