"""Each format, a few rows of it, and what is wrong with rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place
from corolla.data.problems import Problems
from corolla.data.readers.formats import Record
from corolla.data.readers.read import FILE_FORMATS, RECORD_FORMATS, read
from corolla.errors import DataError, InvalidSetting

CONVAI2 = """\
1 your persona: i sing.
2 partner's persona: i row.
3 your persona: i have a cat.
4 hello there\thi , i sing\t\tno , i dance|i am a plumber|hi , i sing
5 what ?\tsongs
1 your persona: i bake.
2 __SILENCE__\tgood morning
3 morning\tbread ?
"""
CSV = """\
user 1 personas,user 2 personas,Best Generated Conversation
"I row.","I sing.
I have a cat.","User 1: Hi!
User 2: Hello!
[They sit down.]
User 2: Shall I sing?

User 1: Please.
A song.
* * *
*User 2:* La la."
"I run.","I bake.","User 2: Bread?
User 1: Yes, ""brown""."
"""


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


def test_convai2(tmp_path: Path) -> None:
    first, second = examples(written(tmp_path / "valid.txt", CONVAI2))
    assert first.turns == (q("hello there"), a("hi , i sing"), q("what ?"), a("songs"))
    assert (first.persona, second.persona) == (("i sing.", "i have a cat."), ("i bake.",))
    assert second.turns == (a("good morning"), q("morning"), a("bread ?"))
    assert (first.place.line, second.place.line) == (1, 6)


def test_distractors_are_never_read(tmp_path: Path) -> None:
    said = {turn.content for example in examples(written(tmp_path / "valid.txt", CONVAI2)) for turn in example.turns}
    assert not {content for content in said if "dance" in content or "plumber" in content}


def test_a_line_of_convai2_without_its_number(tmp_path: Path) -> None:
    problems, told = Problems(), []
    problems.tell = told.append
    path = written(tmp_path / "valid.txt", CONVAI2.replace("5 what", "what"))
    first, second = read(path, problems)
    assert len(first.turns) == 2
    assert len(second.turns) == 3
    assert told == [f"{path}:5: does not begin with the number of a line"]


def test_synthetic_persona_chat(tmp_path: Path) -> None:
    first, second = examples(written(tmp_path / "valid.csv", CSV))
    assert first.turns == (q("Hi!"), a("Hello!\nShall I sing?"), q("Please.\nA song."), a("La la."))
    assert first.persona == ("I sing.", "I have a cat.")
    assert second.turns == (a("Bread?"), q('Yes, "brown".'))
    assert (first.place.line, second.place.line) == (2, 12)


def test_a_row_without_a_conversation(tmp_path: Path) -> None:
    problems, told = Problems(), []
    problems.tell = told.append
    path = written(tmp_path / "valid.csv", CSV + "I row.,I sing.\nI row.,I sing.,nothing\n")
    assert len(list(read(path, problems))) == 2
    assert told == [
        f'{path}:14: has no "Best Generated Conversation"',
        f'{path}:15: has no line that begins with "User 1:" or "User 2:"',
    ]


PERSONACHAT = {
    "personality": ["I sing.", "I have a cat."],
    "utterances": [
        {"history": ["Hi!"], "candidates": ["wrong", "Hello!"]},
        {"history": ["Hi!", "Hello!", "What?"], "candidates": ["No.", "Songs."]},
    ],
}


def test_personachat_as_json(tmp_path: Path) -> None:
    path = written(tmp_path / "personachat.json", json.dumps({"train": [PERSONACHAT, PERSONACHAT], "valid": [PERSONACHAT]}))
    train = examples(path)
    assert train[0].turns == (q("Hi!"), a("Hello!"), q("What?"), a("Songs."))
    assert train[0].persona == ("I sing.", "I have a cat.")
    assert [example.place.line for example in train] == [1, 2]
    assert len(examples(path, split="valid")) == 1
    with pytest.raises(DataError, match="has the parts train, valid, but nothing in 'test'"):
        examples(path, split="test")


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


def test_pairs_are_raw(tmp_path: Path) -> None:
    example = one(tmp_path, {"prompt": "2 + 2 =", "completion": "4", "category": "sums"})
    assert (example.turns, example.raw, example.category) == ((q("2 + 2 ="), a(" 4")), True, "sums")
    assert one(tmp_path, {"prompt": "a\n", "completion": "b"}).turns == (q("a\n"), a("b"))
    assert one(tmp_path, {"completion": "b"}).turns == (a("b"),)


def test_a_list_of_pairs_is_one_example(tmp_path: Path) -> None:
    example = one(tmp_path, [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": "d"}])
    assert example.turns == (q("a"), a(" b"), q("c"), a(" d"))


@pytest.mark.parametrize(
    "value",
    [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    ],
)
def test_chat_turns(tmp_path: Path, value: Any) -> None:
    example = one(tmp_path, value)
    assert (example.system, example.turns) == ("Be kind.", (q("Hi"), a("Hello")))


def test_dolly(tmp_path: Path) -> None:
    value = {"instruction": "Who sang?", "context": "A cat sang.", "response": "A cat.", "category": "closed_qa"}
    example = one(tmp_path, value)
    assert (example.turns, example.category) == ((q("Who sang?\nA cat sang."), a("A cat.")), "closed_qa")
    assert one(tmp_path, {**value, "context": ""}).turns[0] == q("Who sang?")


def test_self_instruct_has_an_example_for_each_instance(tmp_path: Path) -> None:
    value = {"instruction": "Double it.", "instances": [{"input": "2", "output": "4"}, {"input": "", "output": "What?"}]}
    first, second = examples(records(tmp_path / "seeds.jsonl", value))
    assert first.turns == (q("Double it.\n2"), a("4"))
    assert second.turns == (q("Double it."), a("What?"))


def test_oig(tmp_path: Path) -> None:
    example = one(
        tmp_path, {"text": "Background: a zoo.\n<human>: Which <bot>: is it?\n<bot>: This one.\nYes.\n<human>: Oh.", "metadata": {}}
    )
    assert example.turns == (q("Which <bot>: is it?"), a("This one.\nYes."), q("Oh."))
    assert example.system == "Background: a zoo."
    plain = one(tmp_path, {"text": "Once upon a time."})
    assert (plain.turns, plain.raw) == ((a("Once upon a time."),), True)


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


def test_plain_text(tmp_path: Path) -> None:
    first, second = examples(written(tmp_path / "book.txt", "\ufeffOnce upon\n\n a time.\r\n"))
    assert (first.turns, first.raw, first.place.line) == ((a("Once upon"),), True, 1)
    assert (second.turns, second.place.line) == ((a(" a time."),), 3)


def test_a_broken_line_is_named_and_the_rest_is_done(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a", "compl\n{"completion": "b"}\n\n{"completion": "\xff"}\n[3]\n{"completion": "c"}\n')
    problems, told = Problems(), []
    problems.tell = told.append
    assert [example.turns[0].content for example in read(path, problems)] == ["b", "c"]
    assert problems.count == 3
    assert told[0].startswith(f"{path}:1: is no JSON (Unterminated string")
    assert told[1:] == [f"{path}:4: is not UTF-8 (byte 16): convert the file", f'{path}:5: needs "completion" as text']


def test_many_problems_are_only_counted(tmp_path: Path) -> None:
    told: list[str] = []
    problems = Problems(tell=told.append, told=2)
    assert not list(read(written(tmp_path / "x.jsonl", "{\n" * 50), problems, format="pairs"))
    assert (problems.count, len(told)) == (50, 3)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_json_lines_by_whatever_name(tmp_path: Path, name: str) -> None:
    path = records(tmp_path / name, {"completion": "a"}, {"completion": "b"})
    assert [example.place.line for example in examples(path)] == [1, 2]


@pytest.mark.parametrize(
    "layout",
    [
        '[{"completion": "a"}, {"completion": "b"}]',
        '[{"completion": "a"},\n{"completion": "b"}]\n',
        '[\n{"completion": "a"},\n{"completion": "b"}\n]\n',
        '[\n  {\n    "completion": "a"\n  },\n  {\n    "completion": "b"\n  }\n]\n',
        '{"train": [\n{"completion": "a"},\n{"completion": "b"}]}\n',
        '{\n  "train": [\n    {\n      "completion": "a"\n    },\n    {"completion": "b"}\n  ]\n}\n',
        '\n{"completion": "a"}\n\n{"completion": "b"}\n',
        '\ufeff{"train": [{"completion": "a"}, {"completion": "b"}]}',
    ],
)
def test_json_however_it_is_laid_out(tmp_path: Path, layout: str) -> None:
    assert [example.turns[0].content for example in examples(written(tmp_path / "x.json", layout))] == ["a", "b"]


def test_a_list_on_a_line_of_jsonl_is_one_record(tmp_path: Path) -> None:
    value = [{"completion": "a"}, {"completion": "b"}]
    assert len(examples(records(tmp_path / "one.jsonl", value))) == 1
    assert len(examples(records(tmp_path / "two.json", value, value))) == 2


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"completion": "a"}\n' * 1000))
    assert len(examples(path)) == 1000
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is no whole gzip file"):
        examples(path)


def test_a_directory_file_by_file(tmp_path: Path) -> None:
    records(tmp_path / "b.jsonl", {"completion": "b"})
    (tmp_path / "a").mkdir()
    written(tmp_path / "a" / "a.txt", "a\n")
    written(tmp_path / "README.md", "# not data\n")
    assert [example.turns[0].content for example in examples(tmp_path)] == ["a", "b"]


def test_an_empty_file_is_a_problem(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", "\n")
    with pytest.raises(DataError, match=r"x.jsonl:1: the file is empty"):
        examples(path)
    assert not list(read(path, Problems(tell=lambda message: None)))


def test_a_damaged_document(tmp_path: Path) -> None:
    whole = json.dumps({"train": [PERSONACHAT] * 3})
    with pytest.raises(DataError, match="is damaged after record 2"):
        examples(written(tmp_path / "x.json", whole[:-30]))


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="there is no 'sharegpt'; there are convai2"):
        read(tmp_path, Problems(), format="sharegpt")
    with pytest.raises(DataError, match=r"nothing.jsonl does not exist"):
        read(tmp_path / "nothing.jsonl", Problems())
    with pytest.raises(DataError, match="has no files that end in"):
        examples(tmp_path)
    with pytest.raises(DataError, match="of no format that is known by its content"):
        examples(written(tmp_path / "x.md", "# A page\n"))
    with pytest.raises(DataError, match=r"x.jsonl:1: is a record of no format"):
        examples(written(tmp_path / "x.jsonl", '{"a": 1}\n'))
    with pytest.raises(DataError, match="has no record of a format that is known"):
        list(read(tmp_path / "x.jsonl", Problems(tell=lambda message: None)))


def test_a_format_that_is_named(tmp_path: Path) -> None:
    path = records(tmp_path / "x.jsonl", {"instruction": "Do.", "response": "Done.", "completion": "raw"})
    assert not examples(path)[0].raw
    assert examples(path, format="pairs")[0].raw
    assert examples(path, format="text")[0].turns[0].content.startswith('{"instruction"')


def test_a_file_is_read_no_further_than_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", '{"completion": "a"}\n{broken\n')
    stream = read(path, Problems(strict=True))
    assert next(stream).turns == (a("a"),)
    with pytest.raises(DataError, match=r"x.jsonl:2"):
        next(stream)


def test_every_format_says_what_it_is() -> None:
    assert not set(RECORD_FORMATS) & set(FILE_FORMATS)
    assert all(format.about for format in (*RECORD_FORMATS.values(), *FILE_FORMATS.values()))


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
