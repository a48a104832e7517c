from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy
from tokenizers import processors

from corolla.client.tokenizer import TextTokenizer
from corolla.errors import CallerError, CheckpointError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return toy.make_directory(tmp_path, toy.byte_level())


def test_text_goes_there_and_back(directory: Path) -> None:
    tokenizer = TextTokenizer(directory)
    assert tokenizer.decode(tokenizer.encode("hello, Paris! 😀")) == "hello, Paris! 😀"
    assert tokenizer.model_type == "bloom"


@pytest.mark.parametrize("token_id", [10**5, 2**31, 2**32, 2**40, -1])
def test_an_id_outside_the_vocabulary_has_no_text(directory: Path, token_id: int) -> None:
    tokenizer = TextTokenizer(directory)
    assert tokenizer.spelling(token_id) == ""
    assert tokenizer.decode([token_id, *tokenizer.encode("a")]) == "a"


def test_special_tokens_are_spelled_out_in_plain_text(directory: Path) -> None:
    tokenizer = TextTokenizer(directory)
    assert tokenizer.encode("a</s>").count(toy.END) == 1
    assert toy.END not in tokenizer.encode_plain("a</s>")
    assert tokenizer.decode(tokenizer.encode_plain("a</s>")) == "a</s>"
    assert tokenizer.encode("a</s>").count(toy.END) == 1


def test_named_special_tokens_and_ends(directory: Path) -> None:
    tokenizer = TextTokenizer(directory)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.end_ids == (toy.END,)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert TextTokenizer(directory).end_ids == (0, 1, toy.END)


def test_opening_tokens(tmp_path: Path) -> None:
    plain = toy.byte_level()
    assert TextTokenizer(toy.make_directory(tmp_path / "without", plain)).opening_ids == []
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = TextTokenizer(toy.make_directory(tmp_path / "with", plain))
    assert tokenizer.opening_ids == [1]
    assert tokenizer.encode("a", opening=True) == [1, *tokenizer.encode("a")]


def test_the_chat_template_may_lie_in_either_file(directory: Path) -> None:
    assert TextTokenizer(directory).chat_template is None
    for template in ("A", [{"name": "tools", "template": "B"}, {"name": "default", "template": "A"}]):
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert TextTokenizer(directory).chat_template == "A"
    (directory / "chat_template.jinja").write_text("C")
    assert TextTokenizer(directory).chat_template == "C"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named(directory: Path, name: str, content: str) -> None:
    (directory / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        TextTokenizer(directory)


def test_half_a_surrogate_pair_is_no_text(directory: Path) -> None:
    with pytest.raises(CallerError, match="Unicode"):
        TextTokenizer(directory).encode("\udcff")
