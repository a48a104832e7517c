"""Databricks Dolly: an instruction, perhaps a context that it speaks of, a response, a category."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place, joined
from corolla.data.readers.formats import RecordFormat, each, has, text


def _examples(place: Place, value: Any) -> Iterator[Example]:
    context = text(value, "context") if has(value, "context") else ""
    turns = joined([Turn("user", text(value, "instruction")), Turn("user", context), Turn("assistant", text(value, "response"))])
    category = value.get("category")
    yield Example(turns=turns, place=place, category=category if isinstance(category, str) else None)


FORMAT = RecordFormat(
    "dolly",
    'Dolly: "instruction", "response", and if there are any "context" and "category"',
    lambda value: has(value, "instruction", "response"),
    each(_examples),
)
