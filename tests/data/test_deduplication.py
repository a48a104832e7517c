"""What was said before is left out, and nothing else."""

from __future__ import annotations

import pytest

from corolla.chat.templates import Turn
from corolla.data.deduplication import Deduplication, Duplicates
from corolla.data.examples import Example, Place
from corolla.errors import InvalidSetting

LONG = "a fox that is quick and brown jumps over the dog that sleeps beside the old stone wall near the river every morning"
TEXTS = [LONG, "something else", LONG, f"{LONG} again", "something else entirely", LONG.upper()]


def kept(duplicates: Duplicates) -> list[str]:
    filtered = Deduplication(duplicates, 0.8)
    examples = (Example(turns=(Turn("user", text),), place=Place("x", 1)) for text in TEXTS)
    found = [example.turns[0].content for example in examples if filtered.is_new(example)]
    assert filtered.removed == len(TEXTS) - len(found)
    return found


def test_all_are_kept_unless_asked() -> None:
    assert kept("keep") == TEXTS


def test_the_same_to_the_letter() -> None:
    assert kept("exact") == [LONG, "something else", f"{LONG} again", "something else entirely", LONG.upper()]


def test_nearly_the_same() -> None:
    pytest.importorskip("datasketch")
    assert kept("near") == [LONG, "something else", "something else entirely"]


def test_who_says_it_counts() -> None:
    filtered = Deduplication("exact")
    said = [Example(turns=(Turn(role, "hello"),), place=Place("x", 1)) for role in ("user", "assistant")]
    assert all(map(filtered.is_new, said))


def test_bad_settings() -> None:
    with pytest.raises(InvalidSetting, match="duplicates: there is no 'all'; there are keep, exact, near"):
        Deduplication("all")  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="similarity: 0 is no share"):
        Deduplication("near", 0)
