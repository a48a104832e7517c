"""OASST1, whose best-rated children are followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.readers.writing import TREE, a, examples, one, q, records

from corolla.errors import DataError


def test_oasst_follows_the_best_rated_children(tmp_path: Path) -> None:
    example, _ = examples(records(tmp_path / "messages.jsonl", *TREE, *({**each, "message_tree_id": "u"} for each in TREE)))
    assert example.turns == (q("root"), a("best"), q("liked"), a("unranked"))
    assert example.category == "en"


def test_oasst_trees_are_followed_alike(tmp_path: Path) -> None:
    def tree(node: dict[str, Any]) -> dict[str, Any]:
        return {**node, "replies": [tree(child) for child in TREE if child["parent_id"] == node["message_id"]]}

    example = one(tmp_path, {"message_tree_id": "t", "tree_state": "ready", "prompt": tree(TREE[0])})
    assert [turn.content for turn in example.turns] == ["root", "best", "liked", "unranked"]


def test_a_tree_without_a_root_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"messages.jsonl:1: .* no root"):
        examples(records(tmp_path / "messages.jsonl", *TREE[1:]))
