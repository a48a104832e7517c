"""Prompt and completion: `{"prompt": ..., "completion": ...}`, or a list of them, which is one text.

No template goes around them. A blank is put between two that neither of them brings. A list's entries follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place
from corolla.data.readers.formats import RecordFormat, each, has, text


def _pair(value: Any) -> Iterator[Turn]:
    prompt = text(value, "prompt") if has(value, "prompt") else ""
    completion = text(value, "completion")
    if not prompt and not completion:
        raise ValueError("its prompt and its completion are empty")
    if prompt:
        yield Turn("user", prompt)
    if completion:
        apart = not prompt or prompt[-1].isspace() or completion[0].isspace()
        yield Turn("assistant", completion if apart else f" {completion}")


def _examples(place: Place, value: Any) -> Iterator[Example]:
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ValueError("is an empty list")
    turns = tuple(turn for entry in entries for turn in _pair(entry))
    category = entries[0].get("category")
    yield Example(turns=turns, place=place, raw=True, category=category if isinstance(category, str) else None)


def _matches(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return has(first, "completion")


FORMAT = RecordFormat("pairs", '"prompt" and "completion", or a list of them; no template goes around them', _matches, each(_examples))
