"""Dolly."""

from __future__ import annotations

from pathlib import Path

from data.readers.writing import a, one, q


def test_dolly(tmp_path: Path) -> None:
    value = {"instruction": "Who sang?", "context": "A cat sang.", "response": "A cat.", "category": "closed_qa"}
    example = one(tmp_path, value)
    assert (example.turns, example.category) == ((q("Who sang?\nA cat sang."), a("A cat.")), "closed_qa")
    assert one(tmp_path, {**value, "context": ""}).turns[0] == q("Who sang?")
