"""Rows of some formats, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corolla.chat.templates import Turn
from corolla.data.examples import Example
from corolla.data.problems import Problems
from corolla.data.readers.read import read

PERSONACHAT = {
    "personality": ["I sing.", "I have a cat."],
    "utterances": [
        {"history": ["Hi!"], "candidates": ["wrong", "Hello!"]},
        {"history": ["Hi!", "Hello!", "What?"], "candidates": ["No.", "Songs."]},
    ],
}


def q(content: str) -> Turn:
    return Turn("user", content)


def a(content: str) -> Turn:
    return Turn("assistant", content)


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def examples(path: Path, **options: Any) -> list[Example]:
    return list(read(path, Problems(strict=True), **options))


def records(path: Path, *values: Any) -> Path:
    return written(path, "".join(json.dumps(value) + "\n" for value in values))


def one(path: Path, value: Any) -> Example:
    (example,) = examples(records(path / "one.jsonl", value))
    return example


def message(name: str, parent: str | None, **fields: Any) -> dict[str, Any]:
    role = "prompter" if fields.pop("asks", False) else "assistant"
    return {"message_id": name, "parent_id": parent, "message_tree_id": "t", "role": role, "text": name, "lang": "en", **fields}


TREE = [
    message("root", None, asks=True),
    message("second", "root", rank=1),
    message("best", "root", rank=0),
    message("deleted", "root", rank=-1, deleted=True),
    message("disliked", "best", asks=True, emojis={"name": ["+1", "-1"], "count": [1, 3]}),
    message("liked", "best", asks=True, emojis={"name": ["+1"], "count": [2]}),
    message("refused", "liked", review_result=False),
    message("unranked", "liked"),
]
