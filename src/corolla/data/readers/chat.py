"""Chat turns: `messages` of role and content, or `conversations` of from and value (ShareGPT's names)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corolla.chat.templates import Role, Turn
from corolla.data.examples import Example, Place, joined
from corolla.data.readers.formats import RecordFormat, each, has, text

_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}


def _examples(place: Place, value: Any) -> Iterator[Example]:
    messages = next((value[field] for field in ("messages", "conversations") if has(value, field)), value)
    if not isinstance(messages, list) or not messages:
        raise ValueError('needs "messages" (or "conversations") as a list with at least one')
    system = None
    turns = []
    for index, message in enumerate(messages):
        role = text(message, "from" if has(message, "from") else "role")
        content = text(message, "value" if has(message, "value") else "content")
        if role in ("system", "developer"):
            if index > 0:
                raise ValueError(f"message {index + 1} is a system prompt, and only the first may be one")
            system = content
        elif role in _ROLES:
            turns.append(Turn(_ROLES[role], content))
        else:
            raise ValueError(f"message {index + 1} has the role {role!r}; there are system, {', '.join(_ROLES)}")
    category = value.get("category") if isinstance(value, dict) else None
    yield Example(turns=joined(turns), place=place, system=system, category=category if isinstance(category, str) else None)


def _matches(value: Any) -> bool:
    listed = isinstance(value, list) and value and (has(value[0], "role", "content") or has(value[0], "from", "value"))
    return bool(listed) or has(value, "messages") or has(value, "conversations")


FORMAT = RecordFormat("chat", '"messages" of role and content, or "conversations" of from and value', _matches, each(_examples))
