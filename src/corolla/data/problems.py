"""What is wrong with single lines of a file: told, counted, and the rest is done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from corolla.data.examples import Place
from corolla.errors import DataError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Problems:
    """Counts the lines that could not be used, and tells of the first `told` of them.

    `strict` makes the first of them a `DataError` instead.
    """

    strict: bool = False
    tell: Callable[[str], None] = log.warning
    told: int = 20
    count: int = 0

    def add(self, place: Place, problem: str) -> None:
        """Count one. Raises `DataError` if `strict`."""
        message = f"{place}: {problem}"
        if self.strict:
            raise DataError(message)
        self.count += 1
        if self.count <= self.told:
            self.tell(message)
        elif self.count == self.told + 1:
            self.tell("more such lines are only counted")
