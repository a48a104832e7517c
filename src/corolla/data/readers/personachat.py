"""PersonaChat as the JSON of bavard/personachat_truecased.

`{"personality": [...], "utterances": [{"history": [...], "candidates": [..., gold]}]}`: the last utterance's history with its
gold reply is the whole dialogue. The other candidates are distractors and never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place, joined
from corolla.data.readers.formats import RecordFormat, each, has

_SILENCE = "__ SILENCE __"


def _texts(value: Any, field: str) -> list[str]:
    content = value.get(field) if isinstance(value, dict) else None
    if not isinstance(content, list) or not all(isinstance(entry, str) for entry in content):
        raise ValueError(f'needs "{field}" as a list of texts')
    return content


def _examples(place: Place, value: Any) -> Iterator[Example]:
    persona = tuple(_texts(value, "personality"))
    utterances = value.get("utterances")
    if not isinstance(utterances, list) or not utterances:
        raise ValueError('needs "utterances" as a list with at least one')
    history, candidates = _texts(utterances[-1], "history"), _texts(utterances[-1], "candidates")
    if not candidates:
        raise ValueError('its last utterance has no "candidates"')
    # The speakers take turns, and the gold reply is the assistant's: told from the end.
    said = [*history, candidates[-1]]
    turns = [Turn("assistant" if (len(said) - index) % 2 else "user", text) for index, text in enumerate(said) if text != _SILENCE]
    yield Example(turns=joined(turns), place=place, persona=persona)


FORMAT = RecordFormat(
    "personachat",
    'PersonaChat, JSON: "personality" and "utterances", each with "history" and "candidates", the gold reply last',
    lambda value: has(value, "personality", "utterances"),
    each(_examples),
)
