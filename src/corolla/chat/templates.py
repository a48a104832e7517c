"""How a conversation becomes tokens for a given family of models, and where an answer stops.

A declared template is data: one entry of `TEMPLATES`. The entry `tokenizer` stands for the model's own template, in Jinja's
language; one renderer serves all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from corolla.chat.rendering import OwnTemplate
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import InvalidSetting

Role = Literal["user", "assistant"]


class Turn(NamedTuple):
    """What one side said."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The marks around what is said. An answer is asked for by `answer_prefix` without trailing spaces.

    Only in marks do the written forms of `special_tokens` mean these tokens; in what is said they stay text. Other marks
    are text too, and tokenized together with what they surround, as they were in training.
    """

    name: str
    about: str
    system: str = ""  # the system prompt when the user gives none
    system_prefix: str = ""
    system_suffix: str = ""
    question_prefix: str = ""
    question_suffix: str = ""
    answer_prefix: str = ""
    answer_suffix: str = ""
    opening: tuple[Turn, ...] = ()  # said before any conversation
    special_tokens: tuple[str, ...] = ()
    stop_sequences: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()  # beside the model's own end tokens; those the vocabulary lacks are passed over
    own: bool = False  # the tokenizer's: of the above only the stops count


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="tokenizer", about="the model's own chat template", own=True),
        Template(
            name="bloomchat",
            about="BLOOMChat: <human>: question, <bot>: answer",
            system_suffix="\n",
            question_prefix="<human>: ",
            question_suffix="\n",
            answer_prefix="<bot>: ",
            answer_suffix="\n",
            stop_sequences=("<human>",),
            stop_tokens=("</s>",),
        ),
        Template(
            # The </s> that closes an answer is the one that opens the next question, so answers have no suffix of their own.
            name="sft-chat",
            about="bloomz-sft-chat: </s>question<s>answer</s>question<s>",
            system_suffix="\n",
            question_prefix="</s>",
            question_suffix="<s>",
            special_tokens=("</s>", "<s>"),
            stop_tokens=("</s>",),
        ),
        Template(
            name="petals",
            about="chat.petals.dev: Human and Assistant, turns separated by ###",
            system="A conversation of a human with an AI assistant that answers questions helpfully, in detail and politely.",
            system_suffix="###",
            question_prefix="Human: ",
            question_suffix="###",
            answer_prefix="Assistant: ",
            answer_suffix="###",
            opening=(Turn("assistant", "Hi! How can I help you?"),),
            stop_sequences=("###",),
            stop_tokens=("</s>",),
        ),
        Template(
            name="plain",
            about="models without a template: User and Assistant, one line each",
            system_suffix="\n\n",
            question_prefix="User: ",
            question_suffix="\n",
            answer_prefix="Assistant: ",
            answer_suffix="\n",
            stop_sequences=("\nUser:", "\nAssistant:"),
        ),
    )
}


def template_named(name: str) -> Template:
    """The template of that name. Raises `InvalidSetting` when there is none."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise InvalidSetting("template", f"there is no {name!r}; there are {', '.join(TEMPLATES)}") from None


def default_template(tokenizer: TextTokenizer, model: str = "") -> Template:
    """The tokenizer's own template if it has one, else the one of its family (by the `model`'s name or type), else `plain`."""
    if tokenizer.chat_template is not None:
        return replace(TEMPLATES["tokenizer"], stop_sequences=tokenizer.stop_sequences)
    name = f"{model} {tokenizer.directory.name}".lower()
    if "sft-chat" in name:
        return TEMPLATES["sft-chat"]
    if tokenizer.model_type == "bloom":
        return TEMPLATES["bloomchat"]
    return TEMPLATES["plain"]


def stop_ids(template: Template, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the model's own and the template's."""
    declared = (tokenizer.token_id(token) for token in template.stop_tokens)
    return tuple(sorted({*tokenizer.end_ids, *(token_id for token_id in declared if token_id is not None)}))


def encode(template: Template, tokenizer: TextTokenizer, system: str, turns: Sequence[Turn]) -> list[int]:
    """The tokens of a conversation up to where the next answer begins.

    A growing conversation's tokens begin with those of the shorter one (a model's own template may decide otherwise).
    Raises as `OwnTemplate` does where the template is the model's own.
    """
    if template.own:
        return tokenizer.encode(OwnTemplate(tokenizer).render(system, turns))
    tokens = list(tokenizer.opening_ids)
    text = ""
    for piece, marked in _render(template, system, turns):
        token_id = tokenizer.token_id(piece) if marked else None
        if token_id is None:
            text += piece
            continue
        tokens += tokenizer.encode_plain(text) if text else []
        tokens.append(token_id)
        text = ""
    return tokens + (tokenizer.encode_plain(text) if text else [])


def _render(template: Template, system: str, turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
    """Pieces of text, each with whether it is a special token written out."""
    if system:
        yield from marks_of(template, template.system_prefix)
        yield system, False
        yield from marks_of(template, template.system_suffix)
    for turn in (*template.opening, *turns):
        asks = turn.role == "user"
        yield from marks_of(template, template.question_prefix if asks else template.answer_prefix)
        yield turn.content, False
        yield from marks_of(template, template.question_suffix if asks else template.answer_suffix)
    yield from marks_of(template, template.answer_prefix.rstrip())


def marks_of(template: Template, text: str) -> Iterator[tuple[str, bool]]:
    """A piece of the template, cut at its special tokens: each part with whether it is one."""
    if not template.special_tokens:
        yield text, False
        return
    for piece in re.split(f"({'|'.join(map(re.escape, template.special_tokens))})", text):
        if piece:
            yield piece, piece in template.special_tokens
