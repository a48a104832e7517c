"""What is wrong with records, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.readers.writing import PERSONACHAT, TREE, one
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.data.examples import Place
from corolla.data.problems import Problems
from corolla.data.readers.formats import Record
from corolla.data.readers.read import RECORD_FORMATS
from corolla.errors import DataError


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"personality": "I sing.", "utterances": [{}]}, 'needs "personality" as a list of texts'),
        ({"personality": [], "utterances": []}, 'needs "utterances" as a list with at least one'),
        ({"personality": [], "utterances": [{"history": [], "candidates": []}]}, 'has no "candidates"'),
        ({"messages": []}, 'needs "messages"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 has the role 'tool'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}, "message 2 is a system prompt"),
        ({"messages": [{"role": "user", "content": None}]}, 'needs "content" as text'),
        ({"instruction": "Do.", "response": 3}, 'needs "response" as text'),
        ({"instruction": "Do.", "instances": []}, 'needs "instances"'),
        ({"instruction": "Do.", "instances": [{"input": ""}]}, 'needs "output"'),
        ({"completion": 7}, 'needs "completion" as text'),
        ({"prompt": "", "completion": ""}, "are empty"),
        ([{"completion": "x"}, 3], 'needs "completion" as text'),
        ({"text": " "}, "its text is empty"),
        ({"message_tree_id": "1", "prompt": {"text": "x", "role": "judge"}}, "has the role 'judge'"),
        ({"message_tree_id": "1", "prompt": {"text": "x", "role": "prompter", "replies": 3}}, "no list"),
    ],
)
def test_records_that_lack_something(tmp_path: Path, value: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as told:
        one(tmp_path, value)
    assert str(told.value).startswith(f"{tmp_path / 'one.jsonl'}:1: ")


WHOLE: list[tuple[str, Any]] = [
    ("personachat", PERSONACHAT),
    ("pairs", [{"prompt": "a", "completion": "b", "category": "c"}]),
    ("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    ("chat", {"conversations": [{"from": "human", "value": "a"}]}),
    ("dolly", {"instruction": "a", "context": "b", "response": "c", "category": "d"}),
    ("self-instruct", {"instruction": "a", "instances": [{"input": "b", "output": "c"}]}),
    ("oig", {"text": "<human>: a\n<bot>: b"}),
    ("oasst", TREE[0]),
    ("oasst", {**TREE[4], "parent_id": None}),
    ("oasst-trees", {"message_tree_id": "t", "prompt": {**TREE[0], "replies": [TREE[1], {**TREE[4], "replies": []}]}}),
]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def damaged(value: Any, draw: st.DrawFn) -> Any:
    """`value` with one node anywhere in it replaced by anything, or left out."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or draw(st.integers(0, 3)) == 0:
        return draw(ANYTHING)
    key = draw(st.sampled_from(keys))
    copy = value.copy()
    if draw(st.integers(0, 5)) == 0:
        del copy[key]
    else:
        copy[key] = damaged(value[key], draw)
    return copy


@pytest.mark.parametrize(("name", "whole"), WHOLE)
@given(data=st.data())
@settings(deadline=None)
def test_no_record_ends_a_reader_that_is_not_strict(name: str, whole: Any, data: st.DataObject) -> None:
    values = [whole, damaged(whole, data.draw), whole]
    found = [Record(Place("x", line), value) for line, value in enumerate(values, 1)]
    problems = Problems(tell=lambda message: None)
    for example in RECORD_FORMATS[name].read(found, problems):
        assert all(turn.content and turn.role in ("user", "assistant") for turn in example.turns)
        assert all(isinstance(text, str) for text in (*example.persona, *(turn.content for turn in example.turns)))
