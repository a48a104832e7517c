"""Self-Instruct's tasks: an instruction with instances, each an input (perhaps empty) and an output. An instance is an example."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place, joined
from corolla.data.readers.formats import RecordFormat, each, has, text


def _examples(place: Place, value: Any) -> Iterator[Example]:
    instruction, instances = text(value, "instruction"), value.get("instances")
    if not isinstance(instances, list) or not instances:
        raise ValueError('needs "instances" as a list with at least one')
    for instance in instances:
        turns = [Turn("user", instruction), Turn("user", text(instance, "input")), Turn("assistant", text(instance, "output"))]
        yield Example(turns=joined(turns), place=place)


FORMAT = RecordFormat(
    "self-instruct",
    'Self-Instruct: "instruction" and "instances" of "input" and "output"',
    lambda value: has(value, "instruction", "instances"),
    each(_examples),
)
