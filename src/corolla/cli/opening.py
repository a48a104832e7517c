"""A model opened for a command, with progress shown until it is ready."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from corolla.cli.progress import showing_progress

if TYPE_CHECKING:
    from corolla.server.embedded import Embedded


@contextmanager
def opened(model: str, **machine: Any) -> Iterator[Embedded]:
    """`server.embedded.open_model`; the bars are gone before the block begins."""
    from corolla.server.embedded import open_model

    with ExitStack() as stack:
        with showing_progress() as progress:
            embedded = stack.enter_context(open_model(model, progress=progress, **machine))
        yield embedded
