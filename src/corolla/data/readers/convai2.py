"""PersonaChat as ConvAI2's text files, the format of ParlAI.

    1 your persona: i love to read.
    2 partner's persona: i have two dogs.
    3 what the partner says<TAB>what you reply<TAB>reward<TAB>candidate|candidate|...

The numbers start again with each dialogue. You are the assistant. The candidates are distractors and never read; the
partner's persona is not known to an assistant and left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place, joined
from corolla.data.problems import Problems
from corolla.data.readers.files import lines
from corolla.data.readers.formats import FileFormat

_LINE = re.compile(r"(\d+) (.*)", re.DOTALL)
_PERSONA = re.compile(r"(your|partner's) persona: ?(.*)", re.DOTALL)
_SILENCE = "__SILENCE__"  # the partner's words where the other one begins


def _read(path: Path, problems: Problems) -> Iterator[Example]:
    persona: list[str] = []
    turns: list[Turn] = []
    begun, last = Place(str(path), 1), 0

    def dialogue() -> Iterator[Example]:
        if said := joined(turns):
            yield Example(turns=said, place=begun, persona=tuple(persona))
        persona.clear()
        turns.clear()

    for place, line in lines(path, problems):
        match = _LINE.match(line)
        if match is None:
            problems.add(place, "does not begin with the number of a line")
            continue
        number, content = int(match[1]), match[2]
        if number <= last:
            yield from dialogue()
        if number <= last or last == 0:
            begun = place
        last = number
        if (told := _PERSONA.match(content)) is not None:
            if told[1] == "your" and told[2].strip():
                persona.append(told[2].strip())
            continue
        partner, *reply = content.split("\t")
        if partner.strip() != _SILENCE:
            turns.append(Turn("user", partner))
        turns += [Turn("assistant", text) for text in reply[:1]]
    yield from dialogue()


FORMAT = FileFormat(
    "convai2",
    "PersonaChat, ConvAI2's text: numbered lines, `your persona:`, words and reply with a tab between",
    lambda head: re.match(rb"1 (your|partner's) persona:|1 [^\n]*\t", head) is not None,
    _read,
)
