"""PersonaChat as ConvAI2's text."""

from __future__ import annotations

from pathlib import Path

from data.readers.writing import a, examples, q, written

from corolla.data.problems import Problems
from corolla.data.readers.read import read

CONVAI2 = """\
1 your persona: i sing.
2 partner's persona: i row.
3 your persona: i have a cat.
4 hello there\thi , i sing\t\tno , i dance|i am a plumber|hi , i sing
5 what ?\tsongs
1 your persona: i bake.
2 __SILENCE__\tgood morning
3 morning\tbread ?
"""


def test_convai2(tmp_path: Path) -> None:
    first, second = examples(written(tmp_path / "valid.txt", CONVAI2))
    assert first.turns == (q("hello there"), a("hi , i sing"), q("what ?"), a("songs"))
    assert (first.persona, second.persona) == (("i sing.", "i have a cat."), ("i bake.",))
    assert second.turns == (a("good morning"), q("morning"), a("bread ?"))
    assert (first.place.line, second.place.line) == (1, 6)


def test_distractors_are_never_read(tmp_path: Path) -> None:
    said = {turn.content for example in examples(written(tmp_path / "valid.txt", CONVAI2)) for turn in example.turns}
    assert not {content for content in said if "dance" in content or "plumber" in content}


def test_a_line_of_convai2_without_its_number(tmp_path: Path) -> None:
    problems, told = Problems(), []
    problems.tell = told.append
    path = written(tmp_path / "valid.txt", CONVAI2.replace("5 what", "what"))
    first, second = read(path, problems)
    assert len(first.turns) == 2
    assert len(second.turns) == 3
    assert told == [f"{path}:5: does not begin with the number of a line"]
