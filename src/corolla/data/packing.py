"""Articles side by side in sequences of one length, and back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from corolla.data.tokens import Kind, Tokens, concatenated, count
from corolla.errors import InvalidSetting

Packing = Literal["full", "greedy", "single"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingSettings:
    """`max_length` is that of a sequence in tokens, `pad_id` the token that fills one up.

    `full` cuts a stream of articles into sequences, `greedy` puts the next article whole into a sequence while it fits, `single` puts
    each into one of its own. Raises `InvalidSetting` for a value outside its range.
    """

    max_length: int
    pad_id: int
    packing: Packing = "greedy"

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise InvalidSetting("max_length", f"{self.max_length} tokens make no sequence; give at least 1")
        if self.packing not in get_args(Packing):
            raise InvalidSetting("packing", f"there is no {self.packing!r}; there are {', '.join(get_args(Packing))}")


@dataclass(slots=True)
class Utilization:
    """How much of the sequences is not padding; lengths in tokens."""

    sequences: int = 0
    tokens: int = 0
    padding: int = 0

    def add(self, sequence: Tokens) -> None:
        """Count a sequence."""
        padding = count(sequence, Kind.PADDING)
        self.sequences += 1
        self.tokens += len(sequence) - padding
        self.padding += padding

    @property
    def share(self) -> float:
        """From 0 to 1; 0 where there are no sequences."""
        return self.tokens / max(1, self.tokens + self.padding)


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """The items in an order that the seed alone decides."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def pack(articles: Iterable[Tokens], settings: PackingSettings) -> Iterator[Tokens]:
    """Sequences of `max_length`, the articles in their order; what is left of the last one is padding.

    Articles are as `render` makes them: with at least one token, and ending with a token of kind `END` unless they were cut at
    `max_length`. Raises `InvalidSetting` for one that is longer (but for `full`), or has no end and would run into the next.
    """
    waiting: list[Tokens] = []  # goes into the next sequence
    room = settings.max_length
    for article in articles:
        _check(article, settings)
        if settings.packing != "full" and waiting and (settings.packing == "single" or len(article) > room):
            yield _padded(waiting, room, settings)
            waiting, room = [], settings.max_length
        while len(article) >= room:
            yield concatenated([*waiting, article[:room]])
            article = article[room:]
            waiting, room = [], settings.max_length
        if len(article):
            waiting.append(article)
            room -= len(article)
    if waiting:
        yield _padded(waiting, room, settings)


def unpack(sequences: Iterable[Tokens], packing: Packing) -> Iterator[Tokens]:
    """The articles of packed sequences, in their order.

    An article ends with a token of kind `END`, before padding, and with its sequence but in `full`; each part of one that was
    rendered with a boundary for every pair is an article here.
    """
    begun: list[Tokens] = []
    for sequence in sequences:
        sequence = sequence[: len(sequence) - count(sequence, Kind.PADDING)]
        start = 0
        for end in (np.flatnonzero(sequence.token_type_ids == Kind.END) + 1).tolist():
            yield concatenated([*begun, sequence[start:end]])
            begun, start = [], end
        if start < len(sequence):
            begun.append(sequence[start:])
        if begun and packing != "full":
            yield concatenated(begun)
            begun = []
    if begun:
        yield concatenated(begun)


def _check(article: Tokens, settings: PackingSettings) -> None:
    if settings.packing == "full":
        if article.token_type_ids[-1] != Kind.END:
            raise InvalidSetting(
                "max_length", "articles that are cut have no end, which packing in full needs: render without a max_length"
            )
    elif len(article) > settings.max_length:
        problem = f"an article of {len(article)} tokens does not fit {settings.max_length}: render with this max_length, or pack in full"
        raise InvalidSetting("max_length", problem)
    elif article.token_type_ids[-1] != Kind.END and len(article) < settings.max_length:
        raise InvalidSetting("max_length", f"an article was cut at {len(article)} tokens: render and pack with the same max_length")


def _padded(parts: Sequence[Tokens], room: int, settings: PackingSettings) -> Tokens:
    categories = None if parts[0].category_ids is None else np.full(room, -1, np.int32)
    padding = Tokens(np.full(room, settings.pad_id, np.int32), np.full(room, Kind.PADDING, np.int32), categories)
    return concatenated([*parts, padding])
