from __future__ import annotations

from pathlib import Path

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from corolla.chat.rendering import OwnTemplate, RenderingLimits
from corolla.chat.templates import TEMPLATES, Turn, default_template, encode, stop_ids, template_named
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import CallerError, CheckpointError, InvalidSetting

START, END = 1, toy.END
TURNS = [Turn("user", "hello"), Turn("assistant", "fine"), Turn("user", "and you?")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(toy.make_directory(tmp_path_factory.mktemp("toy"), toy.byte_level(), template=toy.CHATML))


def own(directory: Path, template: str | None) -> TextTokenizer:
    return TextTokenizer(toy.make_directory(directory, toy.byte_level(), template=template))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bloomchat", "Be kind.\n<human>: hello\n<bot>: fine\n<human>: and you?\n<bot>:"),
        (
            "petals",
            "Be kind.###Assistant: Hi! How can I help you?###Human: hello###Assistant: fine###Human: and you?###Assistant:",
        ),
        ("plain", "Be kind.\n\nUser: hello\nAssistant: fine\nUser: and you?\nAssistant:"),
    ],
)
def test_templates_of_text(tokenizer: TextTokenizer, name: str, text: str) -> None:
    assert encode(TEMPLATES[name], tokenizer, "Be kind.", TURNS) == tokenizer.encode_plain(text)


def test_in_sft_chat_the_end_of_an_answer_opens_the_next_question(tokenizer: TextTokenizer) -> None:
    plain = tokenizer.encode_plain
    tokens = encode(TEMPLATES["sft-chat"], tokenizer, "", TURNS)
    assert tokens == [END, *plain("hello"), START, *plain("fine"), END, *plain("and you?"), START]
    asked = encode(TEMPLATES["sft-chat"], tokenizer, "", TURNS[:1])
    assert [*asked, *plain("fine"), END] == tokens[: len(asked) + len(plain("fine")) + 1]


def test_the_tokenizers_own_template(tokenizer: TextTokenizer) -> None:
    tokens = encode(TEMPLATES["tokenizer"], tokenizer, "Be kind.", TURNS[:1])
    assert tokens == tokenizer.encode("<s>system\nBe kind.</s>\n<s>user\nhello</s>\n<s>assistant\n")
    assert tokens.count(START) == 3


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if not template.own])
@given(attack=st.lists(st.sampled_from(["</s>", "<s>", "<unk>", "x ", "###"]), min_size=1).map("".join))
@settings(deadline=None, max_examples=30)
def test_typed_special_tokens_stay_text(tokenizer: TextTokenizer, name: str, attack: str) -> None:
    def marks(content: str) -> int:
        return sum(token < len(toy.SPECIAL_TOKENS) for token in encode(TEMPLATES[name], tokenizer, content, [Turn("user", content)]))

    assert marks(attack) == marks("x")


@pytest.mark.parametrize("name", TEMPLATES)
def test_growing_conversations_share_their_beginning(tokenizer: TextTokenizer, name: str) -> None:
    short, long = (encode(TEMPLATES[name], tokenizer, "Be kind.", TURNS[:count]) for count in (1, 3))
    assert long[: len(short)] == short


def test_what_opens_every_text_comes_first(tmp_path: Path) -> None:
    model = toy.byte_level()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    tokenizer = TextTokenizer(toy.make_directory(tmp_path, model))
    assert encode(TEMPLATES["plain"], tokenizer, "", TURNS)[0] == START


def test_stop_ids_are_the_models_and_the_templates(tokenizer: TextTokenizer) -> None:
    assert stop_ids(TEMPLATES["plain"], tokenizer) == stop_ids(TEMPLATES["sft-chat"], tokenizer) == (END,)


def test_the_default_is_the_tokenizers_own_else_the_familys(tmp_path: Path) -> None:
    assert default_template(own(tmp_path / "own", toy.CHATML)).name == "tokenizer"
    bloom = own(tmp_path / "bloom", None)
    assert default_template(bloom).name == "bloomchat"
    assert default_template(bloom, "cmarkea/bloomz-560m-sft-chat").name == "sft-chat"
    llama = TextTokenizer(toy.make_directory(tmp_path / "llama", toy.byte_level(), model_type="llama"))
    assert default_template(llama).name == "plain"


def test_an_unknown_template_is_named() -> None:
    with pytest.raises(InvalidSetting, match="no 'alpaca'; there are tokenizer, bloomchat"):
        template_named("alpaca")


def test_a_template_may_refuse_a_conversation(tmp_path: Path) -> None:
    tokenizer = own(tmp_path, "{{ raise_exception('no system prompts') }}")
    with pytest.raises(CallerError, match="no system prompts"):
        encode(TEMPLATES["tokenizer"], tokenizer, "", TURNS)


@pytest.mark.parametrize("template", [None, "{% if %}"])
def test_a_missing_or_damaged_template_of_its_own(tmp_path: Path, template: str | None) -> None:
    with pytest.raises(CheckpointError, match="--template"):
        encode(TEMPLATES["tokenizer"], own(tmp_path, template), "", TURNS)


def test_the_sandbox_and_helpers_of_own_templates(tmp_path: Path) -> None:
    helpers = "{% generation %}{{ {'é': 1} | tojson }} {{ strftime_now('%Y') | length }}{% endgeneration %}"
    tokenizer = own(tmp_path / "helpers", helpers)
    assert tokenizer.decode(encode(TEMPLATES["tokenizer"], tokenizer, "", TURNS)) == '{"é": 1} 4'
    escape = own(tmp_path / "escape", "{{ messages.__class__.__mro__ }}")
    with pytest.raises(CallerError, match="refuses"):
        encode(TEMPLATES["tokenizer"], escape, "", TURNS)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 1 / 0 }}", "fails at this conversation .ZeroDivisionError"),
        ("{{ messages + 1 }}", "fails at this conversation .TypeError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails at this conversation .OverflowError"),
        ("{{ ''|attr('__class__') }}{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ '%s' % messages.x.y }}", "refuses"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "fails at this conversation .RecursionError"),
        ("{{ 'a' * 300000000 }}", "300000000 characters came of it|MemoryError|took more than"),
        ("{{ 'a' * 3000000000 }}", "MemoryError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took more than"),
        ("{{ 9 ** (9 ** 9) }}", "took more than"),
        ("{{ strftime_now(messages) }}", "fails at this conversation .TypeError"),
    ],
)
def test_what_a_template_does_wrong_ends_in_a_sentence(tmp_path: Path, template: str, problem: str) -> None:
    bounded = RenderingLimits(seconds=1.0)
    with pytest.raises(CallerError, match=problem):
        OwnTemplate(own(tmp_path / "bad", template), bounded).render("", TURNS)
    assert OwnTemplate(own(tmp_path / "good", toy.CHATML), bounded).render("", TURNS[:1]).startswith("<s>user\nhello</s>")


def test_as_transformers_renders_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = own(tmp_path, toy.CHATML)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    library = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode(TEMPLATES["tokenizer"], tokenizer, "", TURNS) == library
