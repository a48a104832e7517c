"""Prompts and completions, which no template goes around."""

from __future__ import annotations

from pathlib import Path

from data.readers.writing import a, one, q


def test_pairs_are_raw(tmp_path: Path) -> None:
    example = one(tmp_path, {"prompt": "2 + 2 =", "completion": "4", "category": "sums"})
    assert (example.turns, example.raw, example.category) == ((q("2 + 2 ="), a(" 4")), True, "sums")
    assert one(tmp_path, {"prompt": "a\n", "completion": "b"}).turns == (q("a\n"), a("b"))
    assert one(tmp_path, {"completion": "b"}).turns == (a("b"),)


def test_a_list_of_pairs_is_one_example(tmp_path: Path) -> None:
    example = one(tmp_path, [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": "d"}])
    assert example.turns == (q("a"), a(" b"), q("c"), a(" d"))
