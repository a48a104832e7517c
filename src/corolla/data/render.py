"""A dialogue as tokens, each marked as prompt or as trained on, spelled as it will be when the trained model is talked with.

What a model is trained on in an answer is what it has to generate: everything from where the prompt for this answer ends
(`chat.templates.encode`) up to what stops the answer, that included. Where the stop belongs to the marks of the next
question (`<human>`, or the `</s>` of sft-chat), it is trained on there, and after the last answer the end token stands for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

from corolla.chat.templates import Template, Turn, _marks, stop_ids
from corolla.data.examples import Example
from corolla.data.own_template import OwnTemplate
from corolla.data.problems import Problems
from corolla.data.tokens import Kind, Tokens, TrainingTokenizer, count
from corolla.errors import CallerError, InvalidSetting

Loss = Literal["answers", "all"]
Truncation = Literal["left", "right", "drop"]
Boundary = Literal["article", "pair"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderSettings:
    """How dialogues become articles.

    `max_length` is that of an article in tokens, `None` for any; `truncation` says which end of a longer one goes, or that it is
    dropped. `loss` is on the assistant's answers with their ends, or on everything. With `history` each answer is an article of its own,
    trained on this answer only, after as many turns before it; with `None` a dialogue is one article. `boundary`: whether a raw list
    of pairs is one article to attend within, or each pair is. Raises `InvalidSetting` for a value outside its range.
    """

    max_length: int | None = None
    truncation: Truncation = "right"
    loss: Loss = "answers"
    history: int | None = None
    boundary: Boundary = "article"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise InvalidSetting("max_length", f"{self.max_length} tokens hold no question and answer; give at least 2")
        if self.history is not None and self.history < 0:
            raise InvalidSetting("history", f"{self.history} turns are less than none")
        for name, values in (("truncation", Truncation), ("loss", Loss), ("boundary", Boundary)):
            if getattr(self, name) not in get_args(values):
                raise InvalidSetting(name, f"there is no {getattr(self, name)!r}; there are {', '.join(get_args(values))}")


@dataclass(slots=True)
class RenderCounts:
    """What came out, and what was left out and why. Lengths are in tokens."""

    articles: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0  # ends included
    truncated_articles: int = 0
    truncated_tokens: int = 0
    too_long_articles: int = 0  # dropped
    too_long_tokens: int = 0
    untrained_articles: int = 0  # dropped: no token of them would be trained on
    untrained_tokens: int = 0

    def add(self, article: Tokens) -> None:
        """Count an article that came out."""
        self.articles += 1
        self.completion_tokens += int(article.trained.sum())
        self.prompt_tokens += count(article, Kind.PROMPT)


class _Piece(NamedTuple):
    text: str
    special: bool  # one special token, written out
    trained: bool


@dataclass(slots=True)
class Renderer:
    """Dialogues as articles, by one tokenizer and one template.

    `categories` gives the numbers of the examples' categories; with it every token has one, -1 where its example has none.
    `counts` goes on from call to call.

    Raises `CallerError` when the tokenizer has no end token, `CheckpointError` when its own template is missing or damaged.
    """

    tokenizer: TrainingTokenizer
    template: Template
    settings: RenderSettings = field(default_factory=RenderSettings)
    categories: Mapping[str, int] | None = None
    counts: RenderCounts = field(default_factory=RenderCounts)
    _end: int = field(init=False)
    _stops: frozenset[int] = field(init=False)
    _template: OwnTemplate | None = field(init=False)

    def __post_init__(self) -> None:
        self._end = self.tokenizer.end_id
        self._stops = frozenset(stop_ids(self.template, self.tokenizer))
        self._template = OwnTemplate(self.tokenizer) if self.template.own else None

    def render_all(self, examples: Iterable[Example], problems: Problems) -> Iterator[Tokens]:
        """The articles of all examples, in their order. An example that the template or the tokenizer refuses is a problem."""
        for example in examples:
            try:
                articles = list(self.render(example))
            except CallerError as error:
                problems.add(example.place, str(error))
                continue
            yield from articles

    def render(self, example: Example) -> Iterator[Tokens]:
        """The articles of one example: none where nothing of it is trained on, or where it is dropped as too long.

        Raises `CallerError` where the model's own template refuses the turns, does not end answers with an end token, or spells
        earlier turns differently in a longer conversation; and for what is no Unicode text.
        """
        for ids, kinds in self._articles(example):
            if self.settings.loss == "all":
                kinds = [Kind.COMPLETION if kind == Kind.PROMPT else kind for kind in kinds]
            article = self._fitted(self._tokens(ids, kinds, example.category))
            if article is not None:
                self.counts.add(article)
                yield article

    def _articles(self, example: Example) -> Iterator[tuple[list[int], list[int]]]:
        if example.raw:
            yield self._raw(example.turns)
            return
        answers = [index for index, turn in enumerate(example.turns) if turn.role == "assistant"]
        system = instructions(example, self.template)
        if self.settings.history is not None:
            for index in answers:
                turns = example.turns[max(0, index - self.settings.history) : index + 1]
                yield self._chat(system, turns, [len(turns) - 1])
        elif answers:
            yield self._chat(system, example.turns[: answers[-1] + 1], answers)

    def _raw(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Prompts and completions as they stand; each completion ends with the end token, and so does the whole."""
        ids = list(self.tokenizer.opening_ids)
        kinds = [int(Kind.PROMPT)] * len(ids)
        between = Kind.END if self.settings.boundary == "pair" else Kind.COMPLETION
        for index, turn in enumerate(turns):
            tokens = self.tokenizer.encode(turn.content)
            completes = turn.role == "assistant"
            ids += tokens
            kinds += [Kind.COMPLETION if completes else Kind.PROMPT] * len(tokens)
            if completes:
                ids.append(self._end)
                kinds.append(Kind.END if index == len(turns) - 1 else between)
        if turns[-1].role == "user":
            ids.append(self._end)
            kinds.append(Kind.END)
        return ids, kinds

    def _chat(self, system: str, turns: Sequence[Turn], trained: Sequence[int]) -> tuple[list[int], list[int]]:
        if self._template is not None:
            ids, kinds = self._own(self._template, system, turns, trained)
        else:
            ids, kinds = self._declared(system, turns, trained)
        if ids[-1] in self._stops and kinds[-1] == Kind.COMPLETION:
            kinds[-1] = Kind.END
        else:
            ids.append(self._end)
            kinds.append(Kind.END)
        return ids, kinds

    def _declared(self, system: str, turns: Sequence[Turn], trained: Sequence[int]) -> tuple[list[int], list[int]]:
        ids = list(self.tokenizer.opening_ids)
        kinds = [int(Kind.PROMPT)] * len(ids)
        text, spans = "", [0]  # of the run of text under way; of `spans` every second one is trained on

        def finish() -> None:
            nonlocal text, spans
            tokens, starts = self.tokenizer.encode_located(text, plain=True) if text else ([], [])
            inside = np.searchsorted(spans, starts, side="right") % 2 == 0
            ids.extend(tokens)
            kinds.extend(np.where(inside, Kind.COMPLETION, Kind.PROMPT).tolist())
            text, spans = "", [0]

        for piece in _pieces(self.template, system, turns, set(trained)):
            token_id = self.tokenizer.token_id(piece.text) if piece.special else None
            if token_id is not None:
                finish()
                ids.append(token_id)
                kinds.append(Kind.COMPLETION if piece.trained else Kind.PROMPT)
                continue
            if piece.trained != (len(spans) % 2 == 0):
                spans.append(len(text))
            text += piece.text
        finish()
        return ids, kinds

    def _own(self, template: OwnTemplate, system: str, turns: Sequence[Turn], trained: Sequence[int]) -> tuple[list[int], list[int]]:
        text = template.text(system, turns)
        begins = []
        for index in trained:
            prompt = template.text(system, turns[:index])
            if not text.startswith(prompt):
                raise CallerError("the model's chat template spells earlier turns differently in a longer conversation: choose another one")
            begins.append(len(prompt))
        ids, starts = self.tokenizer.encode_located(text, plain=False)
        bounds = [*np.searchsorted(starts, begins).tolist(), len(ids)]
        kinds = [int(Kind.PROMPT)] * len(ids)
        stop = 0
        for begin, end in pairwise(bounds):
            stop = next((index + 1 for index in range(begin, end) if ids[index] in self._stops), 0)
            if not stop:
                raise CallerError("the model's chat template ends an answer with no end token: choose another one")
            kinds[begin:stop] = [Kind.COMPLETION] * (stop - begin)
        return ids[:stop], kinds[:stop]  # what follows the last answer asks for the next one

    def _tokens(self, ids: list[int], kinds: list[int], category: str | None) -> Tokens:
        categories = None
        if self.categories is not None:
            number = -1 if category is None else self.categories.get(category, -1)
            categories = np.full(len(ids), number, np.int32)
        return Tokens(np.array(ids, np.int32), np.array(kinds, np.int32), categories)

    def _fitted(self, article: Tokens) -> Tokens | None:
        limit, length = self.settings.max_length, len(article)
        if limit is not None and length > limit:
            if self.settings.truncation == "drop":
                self.counts.too_long_articles += 1
                self.counts.too_long_tokens += length
                return None
            article = article[:limit] if self.settings.truncation == "right" else article[length - limit :]
        # A lone end token teaches nothing.
        if not count(article, Kind.COMPLETION):
            self.counts.untrained_articles += 1
            self.counts.untrained_tokens += length
            return None
        if len(article) < length:
            self.counts.truncated_articles += 1
            self.counts.truncated_tokens += length - len(article)
        return article


def instructions(example: Example, template: Template) -> str:
    """The system prompt of a dialogue: its own or else the template's, and its persona. Give `corolla chat --system` the same."""
    system = template.system if example.system is None else example.system
    persona = f"Your persona: {' '.join(example.persona)}" if example.persona else ""
    return "\n".join(filter(None, (system, persona)))


def _pieces(template: Template, system: str, turns: Sequence[Turn], trained: set[int]) -> Iterator[_Piece]:
    """What `chat.templates.encode` spells, up to the end of the last turn, and which of it is trained on."""

    def marks(text: str, trained: bool = False) -> Iterator[_Piece]:
        return (_Piece(piece, special, trained) for piece, special in _marks(template, text))

    if system:
        yield from marks(template.system_prefix)
        yield _Piece(system, False, False)
        yield from marks(template.system_suffix)
    closing = _closing(template)
    asked = template.answer_prefix.rstrip()
    for index, turn in enumerate((*template.opening, *turns), -len(template.opening)):
        if turn.role == "user":
            after_answer = index - 1 in trained
            yield from marks(template.question_prefix[:closing], after_answer)
            yield from marks(template.question_prefix[closing:])
            yield _Piece(turn.content, False, False)
            yield from marks(template.question_suffix)
        else:
            learned = index in trained
            yield from marks(asked)
            yield from marks(template.answer_prefix[len(asked) :], learned)
            yield _Piece(turn.content.strip(), False, learned)
            yield from marks(template.answer_suffix, learned)


def _closing(template: Template) -> int:
    """How many characters of the mark before a question belong to what stops the answer before it."""
    marks = template.answer_suffix + template.question_prefix
    special = [token for token in template.stop_tokens if token in template.special_tokens]
    ends = [marks.index(stop) + len(stop) for stop in (*template.stop_sequences, *special) if stop in marks]
    return max(0, min(ends) - len(template.answer_suffix)) if ends else 0
