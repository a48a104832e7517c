from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corolla.client.batch_requests import BatchRequest, digests, read_requests
from corolla.errors import CallerError, DataError, EmptyPrompt, InvalidSetting


def read(directory: Path, text: str, name: str = "in.jsonl") -> list[BatchRequest]:
    (directory / name).write_text(text, encoding="utf-8")
    return list(read_requests(directory / name))


def one(directory: Path, value: Any) -> BatchRequest:
    return read(directory, json.dumps(value))[0]


def test_the_four_ways_of_saying_it(tmp_path: Path) -> None:
    lines = [
        "hello",
        {"id": 7, "prompt": "hello", "max_new_tokens": 3, "metadata": {"task": "greeting"}},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}], "stop": "\n"},
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": "any", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5,
            "logprobs": True, "top_logprobs": 2, "n": 1,
        }},
    ]  # fmt: skip
    plain, prompt, messages, openai = read(tmp_path, "\n".join(map(json.dumps, lines)))
    assert (plain.id, plain.prompt) == ("in.jsonl:1", "hello")
    assert (prompt.id, prompt.settings, prompt.metadata) == ("7", {"max_tokens_to_generate": 3}, {"task": "greeting"})
    assert messages.messages == (("system", "Be brief."), ("user", "hello"))
    assert (openai.id, openai.settings, openai.logprobs) == ("a", {"max_tokens_to_generate": 5, "top_logprobs": 2}, True)
    assert [request.index for request in (plain, prompt, messages, openai)] == [0, 1, 2, 3]


@pytest.mark.parametrize("document", ['["a", "b"]', '{"prompts": ["a", "b"]}', '{"requests": [{"prompt": "a"}, "b"]}'])
def test_a_json_document_is_a_list_of_requests(tmp_path: Path, document: str) -> None:
    assert [request.prompt for request in read(tmp_path, document, "in.json")] == ["a", "b"]


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('"second"')
    (tmp_path / "a.jsonl").write_text('"first"\n\n')
    (tmp_path / "notes.txt").write_text("no request")
    assert [(request.index, request.prompt) for request in read_requests(tmp_path)] == [(0, "first"), (1, "second")]
    assert sorted(digests(tmp_path)) == ["a.jsonl", "b.json"]


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'"fine"\n{"prompt": \n\xff\xfe\n\n"fine too"\n')
    first, broken, binary, last = read_requests(tmp_path / "in.jsonl")
    assert first.error is None
    assert "line 2: it is no JSON" in str(broken.error)
    assert "line 3: it is no UTF-8" in str(binary.error)
    assert (last.id, last.prompt) == ("in.jsonl:5", "fine too")


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ({"id": "x", "text": "hello"}, DataError, "either a prompt or messages"),
        ({"id": "x", "prompt": "a", "messages": []}, DataError, "either a prompt or messages"),
        ({"id": "x", "prompt": "a", "temprature": 1}, InvalidSetting, "temprature: there is no such setting"),
        ({"id": "x", "prompt": "a", "temperature": "hot"}, InvalidSetting, "temperature"),
        ({"id": "x", "prompt": ["a"]}, DataError, "one text"),
        ({"id": "x", "prompt": " "}, EmptyPrompt, "empty"),
        ({"id": "x", "messages": [{"role": "assistant", "content": "a"}]}, DataError, "end with the user's"),
        ({"id": "x", "messages": [{"role": "user"}]}, DataError, "messages are a list"),
        ({"custom_id": "x", "body": {"prompt": "a", "n": 2}}, InvalidSetting, "n: 2 is not supported"),
    ],
)
def test_a_request_that_cannot_be_asked_keeps_its_id(tmp_path: Path, value: Any, error: type[CallerError], says: str) -> None:
    request = one(tmp_path, value)
    assert request.id == "x"
    assert isinstance(request.error, error)
    assert says in str(request.error)


def test_a_number_is_no_request(tmp_path: Path) -> None:
    assert "neither a text nor an object" in str(one(tmp_path, 5).error)


def test_an_input_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(read_requests(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="no files that end in"):
        list(read_requests(tmp_path))
