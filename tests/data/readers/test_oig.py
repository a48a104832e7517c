"""OIG."""

from __future__ import annotations

from pathlib import Path

from data.readers.writing import a, one, q


def test_oig(tmp_path: Path) -> None:
    example = one(
        tmp_path, {"text": "Background: a zoo.\n<human>: Which <bot>: is it?\n<bot>: This one.\nYes.\n<human>: Oh.", "metadata": {}}
    )
    assert example.turns == (q("Which <bot>: is it?"), a("This one.\nYes."), q("Oh."))
    assert example.system == "Background: a zoo."
    plain = one(tmp_path, {"text": "Once upon a time."})
    assert (plain.turns, plain.raw) == ((a("Once upon a time."),), True)
