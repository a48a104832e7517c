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


def _rating(message: Any) -> tuple[float, float]:
    """Greater is better."""
    rank = message.get("rank")
    thumbs = message.get("emojis") or {}
    if has(thumbs, "name", "count"):  # the rows of the hub
        thumbs = dict(zip(thumbs["name"], thumbs["count"], strict=False))
    votes = [thumbs.get(name) for name in ("+1", "-1")]
    up, down = (vote if isinstance(vote, (int, float)) else 0 for vote in votes)
    return -rank if isinstance(rank, (int, float)) else -inf, up - down


def _best(messages: Sequence[Any]) -> Any:
    return max(filter(_usable, messages), key=_rating, default=None)


def _turn(message: Any) -> Turn:
    role = message.get("role")
    if role not in _ROLES:
        raise ValueError(f'a message has the role {role!r}; there are "prompter" and "assistant"')
    return Turn(_ROLES[role], text(message, "text"))


def _tree(place: Place, value: Any) -> Iterator[Example]:
    message = value["prompt"] if has(value["prompt"], "text") and _usable(value["prompt"]) else None
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
            if has(record.value, "message_id", "message_tree_id", "text"):
                yield record
            else:
                problems.add(record.place, 'needs "message_id", "message_tree_id" and "text"')

    for _, group in groupby(messages(), key=lambda record: str(record.value["message_tree_id"])):
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
