"""The CSV of Synthetic-Persona-Chat: the personas of two speakers and a conversation a row.

User 2 is the assistant, with their persona; the other persona is not known to an assistant and left out. The conversations
are generated: stage directions in brackets and rulers are left out, speakers in asterisks are read, other lines without a
speaker belong to the words before them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place, joined
from corolla.data.problems import Problems
from corolla.data.readers.files import opened
from corolla.data.readers.formats import FileFormat
from corolla.errors import DataError

_PERSONA, _CONVERSATION = "user 2 personas", "Best Generated Conversation"
_SAID = re.compile(r"(?P<star>\*?)\s*User ?(?P<who>[12]):\s*(?P<text>.*)")
_NOTHING_SAID = re.compile(r"[\s*]*|[\[(].*[\])]?")


def _turns(conversation: str) -> Iterator[Turn]:
    speaker = None
    for line in map(str.strip, conversation.splitlines()):
        if (said := _SAID.fullmatch(line)) is not None:
            speaker = said["who"]
            line = said["text"].strip("* ") if said["star"] else said["text"]
        elif _NOTHING_SAID.fullmatch(line):
            continue
        if speaker is not None:
            yield Turn("user" if speaker == "1" else "assistant", line)


def _read(path: Path, problems: Problems) -> Iterator[Example]:
    with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as characters:
        rows = csv.DictReader(characters)
        try:
            line = rows.line_num + 1
            for row in rows:
                # A row's quoted fields hold lines of their own: its place is where it begins.
                place, line = Place(str(path), line + (line == 1)), rows.line_num + 1
                persona, conversation = row.get(_PERSONA), row.get(_CONVERSATION)
                if persona is None or conversation is None:
                    problems.add(place, f'has no "{_PERSONA if persona is None else _CONVERSATION}"')
                    continue
                if not (turns := joined(_turns(conversation))):
                    problems.add(place, 'has no line that begins with "User 1:" or "User 2:"')
                    continue
                yield Example(turns=turns, place=place, persona=tuple(filter(None, map(str.strip, persona.splitlines()))))
        except csv.Error as error:
            raise DataError(f"{path} is no CSV at line {rows.line_num} ({error}): fetch it again") from None
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 after line {rows.line_num}: convert the file") from None


FORMAT = FileFormat(
    "synthetic-persona",
    "Synthetic-Persona-Chat, CSV: two personas and a conversation a row",
    lambda head: _CONVERSATION.encode() in head.partition(b"\n")[0],
    _read,
)
