"""Which examples are taken, and which are held out, by a seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import TypeVar

from corolla.data.examples import Example
from corolla.errors import InvalidSetting

T = TypeVar("T")


def sampled(items: Iterable[T], count: int, seed: int) -> list[T]:
    """`count` of the items, each with the same chance, in their order; all of them where there are fewer. Holds `count` at a time.

    Raises `InvalidSetting` for fewer than one.
    """
    if count < 1:
        raise InvalidSetting("samples", f"{count} examples are too few; give at least 1")
    draw = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for index, item in enumerate(items):
        if len(kept) < count:
            kept.append((index, item))
        elif (place := draw.randrange(index + 1)) < count:
            kept[place] = (index, item)
    return [item for _, item in sorted(kept, key=lambda entry: entry[0])]


def fingerprint(example: Example) -> bytes:
    """The SHA-256 of what is said in the example, by whom: 32 bytes."""
    return hashlib.sha256(repr([(turn.role, turn.content) for turn in example.turns]).encode()).digest()


def is_held_out(example: Example, share: float, seed: int) -> bool:
    """Whether the example is of the held-out part, which is about `share` (0 to 1) of all.

    What is said in it decides, with the seed: neither the order of a file nor its other examples do, and the same dialogue
    twice is never on both sides. Raises `InvalidSetting` for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InvalidSetting("held-out", f"{share:g} is no share; give one from 0 to 1")
    return drawn(example, seed) < share


def drawn(example: Example, seed: int) -> float:
    """A number from 0 to below 1 that the seed and what is said in the example decide."""
    digest = hashlib.sha256(fingerprint(example) + str(seed).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
