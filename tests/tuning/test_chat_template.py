"""Declared templates in Jinja's language spell as Corolla spells, and mark what Corolla trains on."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy
from transformers import AutoTokenizer

from corolla.chat.templates import TEMPLATES, Turn, default_template, encode
from corolla.client.tokenizer import TextTokenizer
from corolla.data.examples import Example, Place
from corolla.data.render import Renderer
from corolla.data.tokens import TrainingTokenizer
from corolla.tuning.chat_template import jinja_of

DECLARED = [name for name, template in TEMPLATES.items() if not template.own]
TURNS = (Turn("user", "hello there"), Turn("assistant", "hello, how are you?"), Turn("user", "fine"), Turn("assistant", "Paris!"))
MESSAGES = [{"role": turn.role, "content": turn.content} for turn in TURNS]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return toy.make_directory(tmp_path / "model", toy.byte_level())


@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize("name", DECLARED)
def test_a_prompt_is_spelled_alike(name: str, system: str, directory: Path) -> None:
    template = TEMPLATES[name]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = ([{"role": "system", "content": system}] if system else []) + MESSAGES[:3]
    ids = tokenizer.apply_chat_template(messages, chat_template=jinja_of(template), add_generation_prompt=True)["input_ids"]
    assert ids == encode(template, TextTokenizer(directory), system or template.system, TURNS[:3])


@pytest.mark.parametrize("name", DECLARED)
def test_generation_marks_what_is_trained_on(name: str, directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = tokenizer.apply_chat_template(
        MESSAGES, chat_template=jinja_of(TEMPLATES[name]), return_dict=True, return_assistant_tokens_mask=True
    )
    renderer = Renderer(TrainingTokenizer(directory), TEMPLATES[name])
    (article,) = renderer.render(Example(turns=TURNS, place=Place("here", 1)))
    assert found["input_ids"] == article.input_ids.tolist()
    assert found["assistant_masks"] == article.trained.astype(int).tolist()


def test_the_stops_of_a_template_go_with_it(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = jinja_of(TEMPLATES["bloomchat"])
    tokenizer.init_kwargs["stop_sequences"] = ["<human>"]
    tokenizer.save_pretrained(directory)
    template = default_template(TextTokenizer(directory))
    assert (template.own, template.stop_sequences) == (True, ("<human>",))


def test_the_models_own_has_a_source_already() -> None:
    with pytest.raises(ValueError, match="already"):
        jinja_of(TEMPLATES["tokenizer"])
