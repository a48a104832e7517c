"""A dialogue as token ids, spelled as it will be at inference, and which of them the model is trained on.

What a model is trained on in an answer is what it has to generate: everything from where the prompt for this answer ends
(`chat.templates.encode`) up to what stops the answer, that included. Where the stop belongs to the marks of the next
question (`<human>`, or the `</s>` of sft-chat), it is trained on there; after the last answer the end token stands for it,
which is not spelled here.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from corolla.chat.rendering import OwnTemplate
from corolla.chat.templates import Template, Turn, marks_of, stop_ids
from corolla.data.offsets import Located, Text
from corolla.data.tokens import Kind, TrainingTokenizer
from corolla.errors import CallerError

PROMPT, COMPLETION = bytes([Kind.PROMPT]), bytes([Kind.COMPLETION])


class Spelled(NamedTuple):
    """Token ids, and for each its `Kind` as a byte."""

    ids: list[int]
    kinds: bytearray


Plan = Generator[Text, Located, Spelled]
"""Asks for texts to be tokenized, one at a time, and returns what it makes of them; raises `CallerError` for what cannot be spelled."""


class Spelling(Protocol):
    def spell(self, system: str, turns: Sequence[Turn], trained: Collection[int]) -> Plan:
        """The turns up to the end of the last one, an answer. `trained` are the indices of the answers to train on, ascending."""
        ...


def carried_out(plans: Sequence[Plan], tokenizer: TrainingTokenizer) -> list[Spelled | CallerError]:
    """What each of the plans returns or raises. The texts that they ask for are tokenized together."""
    results: dict[int, Spelled | CallerError] = {}
    given: dict[int, Located | CallerError | None] = dict.fromkeys(range(len(plans)))
    while given:
        asked: dict[int, Text] = {}
        for index, answer in given.items():
            try:
                plan = plans[index]
                asked[index] = plan.throw(answer) if isinstance(answer, CallerError) else plan.send(answer)  # type: ignore[arg-type]
            except StopIteration as end:
                results[index] = end.value
            except CallerError as error:
                results[index] = error
        given = dict(zip(asked, tokenizer.locate(list(asked.values())), strict=True))
    return [results[index] for index in range(len(plans))]


def spelling_of(template: Template, tokenizer: TrainingTokenizer) -> Spelling:
    """How `template` spells. Raises `CheckpointError` when it is the model's own and missing or damaged."""
    return OwnSpelling(tokenizer, template) if template.own else DeclaredSpelling(tokenizer, template)


class _Mark(NamedTuple):
    """A piece of the marks around what is said; with a `token_id` it is this special token."""

    text: str
    token_id: int | None


class _Around(NamedTuple):
    """The marks before and after what is said; `texts` are both where no special token is among them."""

    before: Sequence[_Mark]
    after: Sequence[_Mark]
    texts: tuple[str, str] | None


class DeclaredSpelling:
    """By the marks of a declared template."""

    def __init__(self, tokenizer: TrainingTokenizer, template: Template) -> None:
        self._tokenizer = tokenizer
        self._opening = template.opening

        def marks(text: str) -> tuple[_Mark, ...]:
            return tuple(_Mark(piece, tokenizer.token_id(piece) if special else None) for piece, special in marks_of(template, text))

        def around(prefix: str, suffix: str) -> _Around:
            before, after = marks(prefix), marks(suffix)
            special = any(mark.token_id is not None for mark in before + after)
            return _Around(before, after, None if special else (prefix, suffix))

        asked = template.answer_prefix.rstrip()
        closing = closing_length(template)
        self._system = around(template.system_prefix, template.system_suffix)
        self._closing = marks(template.question_prefix[:closing])
        self._question = around(template.question_prefix[closing:], template.question_suffix)
        self._asked = marks(asked)
        self._answer = around(template.answer_prefix[len(asked) :], template.answer_suffix)

    def spell(self, system: str, turns: Sequence[Turn], trained: Collection[int]) -> Plan:
        run = _Run()
        if system:
            run.say(self._system, system, False)
        for turn in self._opening:
            self._turn(run, turn, False, False)
        for index, turn in enumerate(turns):
            self._turn(run, turn, index in trained, index - 1 in trained)
        return (yield from run.plan(self._tokenizer.opening_ids))

    def _turn(self, run: _Run, turn: Turn, trained: bool, after_trained: bool) -> None:
        if turn.role == "user":
            run.mark(self._closing, after_trained)
            run.say(self._question, turn.content, False)
        else:
            run.mark(self._asked, False)
            run.say(self._answer, turn.content.strip(), trained)  # as `Conversation.answer` keeps it


class _Run:
    """What is said so far: text, which is tokenized together up to the next special token."""

    def __init__(self) -> None:
        self._texts: list[list[str]] = [[]]  # between special tokens
        self._switches: list[list[int]] = [[]]  # where in each training begins, ends, begins again
        self._special: list[tuple[int, bytes]] = []  # after each text but the last one
        self._length = 0  # of the last text, in characters

    def say(self, around: _Around, content: str, trained: bool) -> None:
        if around.texts is not None:
            self._text(f"{around.texts[0]}{content}{around.texts[1]}", trained)
            return
        self.mark(around.before, trained)
        self._text(content, trained)
        self.mark(around.after, trained)

    def mark(self, marks: Sequence[_Mark], trained: bool) -> None:
        for text, token_id in marks:
            if token_id is None:
                self._text(text, trained)
            else:
                self._special.append((token_id, COMPLETION if trained else PROMPT))
                self._texts.append([])
                self._switches.append([])
                self._length = 0

    def plan(self, opening: Sequence[int]) -> Plan:
        ids = list(opening)
        kinds = bytearray(len(ids))
        for index, (parts, switches) in enumerate(zip(self._texts, self._switches, strict=True)):
            if index:
                token_id, kind = self._special[index - 1]
                ids.append(token_id)
                kinds += kind
            if text := "".join(parts):
                found, begun = yield Text(text, switches, plain=True)
                ids += found
                for number, (begin, end) in enumerate(pairwise([0, *begun, len(found)])):
                    kinds += (COMPLETION if number % 2 else PROMPT) * (end - begin)
        return Spelled(ids, kinds)

    def _text(self, text: str, trained: bool) -> None:
        switches = self._switches[-1]
        if trained != len(switches) % 2:
            switches.append(self._length)
        self._texts[-1].append(text)
        self._length += len(text)


def closing_length(template: Template) -> int:
    """How many characters of the mark before a question belong to what stops the answer before it."""
    marks = template.answer_suffix + template.question_prefix
    special = [token for token in template.stop_tokens if token in template.special_tokens]
    ends = [marks.index(stop) + len(stop) for stop in (*template.stop_sequences, *special) if stop in marks]
    return max(0, min(ends) - len(template.answer_suffix)) if ends else 0


class OwnSpelling:
    """By the model's own template in Jinja's language. It has to end each answer with an end token."""

    def __init__(self, tokenizer: TrainingTokenizer, template: Template) -> None:
        self._template = OwnTemplate(tokenizer)
        self._template.check()
        self._stops = frozenset(stop_ids(template, tokenizer))

    def spell(self, system: str, turns: Sequence[Turn], trained: Collection[int]) -> Plan:
        text = self._template.render(system, turns)
        begins = []
        for index in trained:
            prompt = self._template.render(system, turns[:index])
            if not text.startswith(prompt):
                raise CallerError("the model's chat template spells earlier turns differently in a longer dialogue: choose another one")
            begins.append(len(prompt))
        ids, begun = yield Text(text, begins)
        bounds = [*begun, len(ids)]
        kinds = bytearray(len(ids))
        stop = 0
        for begin, end in pairwise(bounds):
            stop = next((index + 1 for index in range(begin, end) if ids[index] in self._stops), 0)
            if not stop:
                raise CallerError("the model's chat template ends an answer with no end token: choose another one")
            kinds[begin:stop] = COMPLETION * (stop - begin)
        return Spelled(ids[:stop], kinds[:stop])  # what follows the last answer asks for the next one
