"""The top of a thread, a task or a request handler: whatever nobody expected is caught there, once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

unexpected: Counter[str] = Counter()
"""Errors that barriers of this process caught since it began, by the barrier's name."""


@contextmanager
def barrier(name: str, on_error: Callable[[Exception], None] | None = None) -> Iterator[None]:
    """Catch every `Exception` of the block: log it with its traceback, count it under `name`, and hand it to `on_error`.

    `on_error` turns the error into the smallest failure that is true (this session, this peer, this server) and must not raise.
    Errors that a caller expects are caught inside the block. `KeyboardInterrupt`, `SystemExit` and a task's cancellation pass.
    """
    try:
        yield
    except Exception as error:
        unexpected[name] += 1
        log.error("an unexpected error in %s: %r", name, error, exc_info=error)
        if on_error is not None:
            on_error(error)
