"""Synthetic-Persona-Chat, a CSV."""

from __future__ import annotations

from pathlib import Path

from data.readers.writing import a, examples, q, written

from corolla.data.problems import Problems
from corolla.data.readers.read import read

CSV = """\
user 1 personas,user 2 personas,Best Generated Conversation
"I row.","I sing.
I have a cat.","User 1: Hi!
User 2: Hello!
[They sit down.]
User 2: Shall I sing?

User 1: Please.
A song.
* * *
*User 2:* La la."
"I run.","I bake.","User 2: Bread?
User 1: Yes, ""brown""."
"""


def test_synthetic_persona_chat(tmp_path: Path) -> None:
    first, second = examples(written(tmp_path / "valid.csv", CSV))
    assert first.turns == (q("Hi!"), a("Hello!\nShall I sing?"), q("Please.\nA song."), a("La la."))
    assert first.persona == ("I sing.", "I have a cat.")
    assert second.turns == (a("Bread?"), q('Yes, "brown".'))
    assert (first.place.line, second.place.line) == (2, 12)


def test_a_row_without_a_conversation(tmp_path: Path) -> None:
    problems, told = Problems(), []
    problems.tell = told.append
    path = written(tmp_path / "valid.csv", CSV + "I row.,I sing.\nI row.,I sing.,nothing\n")
    assert len(list(read(path, problems))) == 2
    assert told == [
        f'{path}:14: has no "Best Generated Conversation"',
        f'{path}:15: has no line that begins with "User 1:" or "User 2:"',
    ]
