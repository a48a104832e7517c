"""OASST1: trees of messages, of which each root is followed along its best-rated children.

Read as trees (one a line, children under "replies") and as messages (one a line or row, with the ids of parent and tree, a
tree's messages one after another). Of two children the better one has the lower "rank", or, unranked, more thumbs up than
down; of equals the first counts. Deleted messages and those that reviewers refused are left out with all below them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import inf
from typing import Any

from corolla.chat.templates import Role, Turn
from corolla.data.examples import Example, Place, joined
from corolla.data.problems import Problems
from corolla.data.readers.formats import Record, RecordFormat, each, has, text

_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}


def _usable(message: Any) -> bool:
    return isinstance(message, dict) and not message.get("deleted") and message.get("review_result") is not False


def _rating(message: Any) -> tuple[float, int]:
    """Greater is better."""
    rank = message.get("rank")
    thumbs = _thumbs(message.get("emojis"))
    return -rank if isinstance(rank, (int, float)) else -inf, thumbs.get("+1", 0) - thumbs.get("-1", 0)


def _thumbs(emojis: Any) -> dict[str, int]:
    """How often each emoji was given; the rows of the hub have names and counts apart."""
    if has(emojis, "name", "count"):
        names, counts = emojis["name"], emojis["count"]
        pairs = list(zip(names, counts, strict=False)) if isinstance(names, list) and isinstance(counts, list) else []
    else:
        pairs = list(emojis.items()) if isinstance(emojis, dict) else []
    return {name: count for name, count in pairs if isinstance(name, str) and isinstance(count, int)}


def _best(messages: Sequence[Any]) -> Any:
    return max(filter(_usable, messages), key=_rating, default=None)


def _turn(message: Any) -> Turn:
    role = text(message, "role")
    if role not in _ROLES:
        raise ValueError(f'a message has the role {role!r}; there are "prompter" and "assistant"')
    return Turn(_ROLES[role], text(message, "text"))


def _tree(place: Place, value: Any) -> Iterator[Example]:
    if not has(value, "prompt") or not isinstance(value["prompt"], dict):
        raise ValueError('needs "prompt" as the message at the root')
    message = _best([value["prompt"]])
    turns = []
    while message is not None:
        turns.append(_turn(message))
        replies = message.get("replies") or []
        if not isinstance(replies, list):
            raise ValueError('has "replies" that are no list')
        message = _best(replies)
    if turns:
        yield Example(turns=joined(turns), place=place, category=_language(value["prompt"]))


def _language(root: Any) -> str | None:
    return root["lang"] if isinstance(root.get("lang"), str) else None


def _messages(records: Iterable[Record], problems: Problems) -> Iterator[Example]:
    def messages() -> Iterator[Record]:
        for record in records:
            value = record.value
            try:
                for field in ("message_id", "message_tree_id"):
                    text(value, field)
                if value.get("parent_id") is not None:
                    text(value, "parent_id")
            except ValueError as error:
                problems.add(record.place, str(error))
            else:
                yield record

    for _, group in groupby(messages(), key=lambda record: record.value["message_tree_id"]):
        place = None
        children: dict[str | None, list[Any]] = {}
        for record in group:
            place = place or record.place
            children.setdefault(record.value.get("parent_id"), []).append(record.value)
        assert place is not None
        root = message = _best(children.get(None, []))
        if root is None:
            problems.add(place, "the messages of this tree have no root that is usable: keep a tree's messages together")
            continue
        turns = []
        try:
            while message is not None:
                turns.append(_turn(message))
                # Taken out, so that no circle of parents is followed twice.
                message = _best(children.pop(message["message_id"], []))
        except ValueError as error:
            problems.add(place, str(error))
            continue
        yield Example(turns=joined(turns), place=place, category=_language(root))


TREES = RecordFormat(
    "oasst-trees",
    'OASST1 as trees: "message_tree_id" and "prompt" with "replies"',
    lambda value: has(value, "message_tree_id", "prompt"),
    each(_tree),
)
MESSAGES = RecordFormat(
    "oasst",
    'OASST1 as messages: "message_id", "parent_id", "message_tree_id", "role", "text"',
    lambda value: has(value, "message_id", "message_tree_id", "text"),
    _messages,
)
