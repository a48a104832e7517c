"""OIG, and BLOOMChat's way to write: `{"text": "<human>: ...\\n<bot>: ..."}`.

What stands before the first speaker is the system prompt. A text without speakers is taken as it is, and all of it trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place, joined
from corolla.data.readers.formats import RecordFormat, each, has, text

_SPEAKER = re.compile(r"^\s*<(human|bot)>:", re.MULTILINE)


def _examples(place: Place, value: Any) -> Iterator[Example]:
    content = text(value, "text")
    if not content.strip():
        raise ValueError("its text is empty")
    before, *said = _SPEAKER.split(content)
    if not said:
        yield Example(turns=(Turn("assistant", content),), place=place, raw=True)
        return
    turns = joined(Turn("user" if who == "human" else "assistant", words) for who, words in zip(said[::2], said[1::2], strict=True))
    yield Example(turns=turns, place=place, system=before.strip() or None)


FORMAT = RecordFormat(
    "oig", 'OIG: "text" with <human>: and <bot>:, or without them as it is', lambda value: has(value, "text"), each(_examples)
)
