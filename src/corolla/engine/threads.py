"""Where what is heavy is computed, so that the engine's thread is the only one of its process that keeps others to help it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
GoOn = Callable[[], None]
_LOOK_AGAIN = 0.1  # seconds, for signals


def on_passing_thread(work: Callable[[GoOn], T]) -> T:
    """What `work` returns or raises, called on a thread that ends with it.

    torch's products run on teams of OpenMP threads, one team for each thread that ever called one, which live as long as it does.
    GNU OpenMP lets none of them spin between two products once all together are more than the machine's cores: each product
    is then slept and woken for, and a token of SmolLM2 on two cores took 43 ms instead of 26. So what is computed before an
    engine runs, its weights above all, leaves no team behind.

    `work` is given a function to call now and then: it raises where the caller was interrupted, who waits for the thread to end, for
    a process must not end while a thread of it computes.
    """
    returned: list[T] = []
    raised: list[BaseException] = []
    interrupted, done = threading.Event(), threading.Event()

    def go_on() -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt

    def run() -> None:
        try:
            go_on()
            returned.append(work(go_on))
        except BaseException as error:  # noqa: BLE001 (raised again on the caller's thread)
            raised.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="corolla-passing", daemon=True)
    try:
        thread.start()
        # A signal just before a wait does not end it, so the wait is cut up; and a `join` that was interrupted counts as done.
        while not done.wait(_LOOK_AGAIN):
            pass
    except BaseException:
        interrupted.set()
        if thread.is_alive():
            done.wait()
        raise
    thread.join()
    if raised:
        raise raised[0]
    return returned[0]
