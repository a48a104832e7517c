"""What every reader yields: one dialogue, or one text, and where it was read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from corolla.chat.templates import Turn


class Place(NamedTuple):
    """Where something was read: a file or the name of a dataset, and its line (or row, or record), from 1."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


class Example(NamedTuple):
    """One dialogue.

    `system` is its own system prompt, `None` where it has none; `persona` are sentences about the assistant. What is `raw`
    is no dialogue but text as it stands, which no template goes around: a prompt is a turn of the user, what completes it
    one of the assistant. `category` is what the source says about its kind.
    """

    turns: tuple[Turn, ...]
    place: Place
    system: str | None = None
    persona: tuple[str, ...] = ()
    raw: bool = False
    category: str | None = None


def joined(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """The turns without blanks around them and without empty ones; what one side says twice in a row is one turn of two lines."""
    result: list[Turn] = []
    for turn in turns:
        if not (content := turn.content.strip()):
            continue
        if result and result[-1].role == turn.role:
            content = f"{result.pop().content}\n{content}"
        result.append(Turn(turn.role, content))
    return tuple(result)
