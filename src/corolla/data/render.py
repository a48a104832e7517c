"""Examples as articles: tokens, each marked as prompt or as trained on, cut to length, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from corolla.chat.templates import Template, Turn, stop_ids
from corolla.data.examples import Example
from corolla.data.offsets import Text
from corolla.data.problems import Problems
from corolla.data.rendering import COMPLETION, PROMPT, Plan, Spelled, Spelling, carried_out, spelling_of
from corolla.data.tokens import Kind, Tokens, TrainingTokenizer
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
    of pairs is one article to attend within, or each pair is. Articles of fewer than `shortest` or more than `longest` tokens are left
    out, whatever `truncation` says; with `keep_untrained` those are kept of which nothing is trained on.
    Raises `InvalidSetting` for a value outside its range.
    """

    max_length: int | None = None
    truncation: Truncation = "right"
    loss: Loss = "answers"
    history: int | None = None
    boundary: Boundary = "article"
    shortest: int = 0
    longest: int | None = None
    keep_untrained: bool = False

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise InvalidSetting("max_length", f"{self.max_length} tokens hold no question and answer; give at least 2")
        if self.history is not None and self.history < 0:
            raise InvalidSetting("history", f"{self.history} turns are less than none")
        if self.shortest < 0 or (self.longest is not None and self.longest < max(1, self.shortest)):
            raise InvalidSetting("longest", f"no article has from {self.shortest} to {self.longest} tokens; give a larger range")
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
    too_short_articles: int = 0  # dropped
    too_short_tokens: int = 0
    too_long_articles: int = 0  # dropped
    too_long_tokens: int = 0
    untrained_articles: int = 0  # dropped: no token of them would be trained on
    untrained_tokens: int = 0


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
    _spelling: Spelling = field(init=False)

    def __post_init__(self) -> None:
        self._end = self.tokenizer.end_id
        self._stops = frozenset(stop_ids(self.template, self.tokenizer))
        self._spelling = spelling_of(self.template, self.tokenizer)

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
        (articles,) = self.spell_all([example])
        if isinstance(articles, CallerError):
            raise articles
        yield from (self._tokens(article, example.category) for article in articles)

    def spell_all(self, examples: Sequence[Example]) -> Iterator[list[Spelled] | CallerError]:
        """For each example its articles, without its category, or what `render` raises. All examples are tokenized together."""
        plans = [self._plans(example) for example in examples]
        results = iter(carried_out([plan for of_one in plans for plan in of_one], self.tokenizer))
        for of_one in plans:
            spelled = [next(results) for _ in of_one]
            error = next((found for found in spelled if isinstance(found, CallerError)), None)
            if error is not None:
                yield error
            else:
                articles = (self._fitted(found) for found in spelled if not isinstance(found, CallerError))
                yield [article for article in articles if article is not None]

    def _plans(self, example: Example) -> list[Plan]:
        if example.raw:
            return [self._raw(example.turns)]
        answers = [index for index, turn in enumerate(example.turns) if turn.role == "assistant"]
        system = instructions(example, self.template)
        if self.settings.history is None:
            return [self._chat(system, example.turns[: answers[-1] + 1], answers)] if answers else []
        before = [example.turns[max(0, index - self.settings.history) : index + 1] for index in answers]
        return [self._chat(system, turns, [len(turns) - 1]) for turns in before]

    def _raw(self, turns: Sequence[Turn]) -> Plan:
        """Prompts and completions as they stand; each completion ends with the end token, and so does the whole."""
        ids = list(self.tokenizer.opening_ids)
        kinds = bytearray(len(ids))
        for turn in turns:
            tokens, _ = yield Text(turn.content)
            ids += tokens
            if turn.role == "assistant":
                ids.append(self._end)
                kinds += COMPLETION * len(tokens)
                kinds.append(Kind.END if self.settings.boundary == "pair" else Kind.COMPLETION)
            else:
                kinds += PROMPT * len(tokens)
        if turns[-1].role == "assistant":
            kinds[-1] = Kind.END
        else:
            ids.append(self._end)
            kinds.append(Kind.END)
        return Spelled(ids, kinds)

    def _chat(self, system: str, turns: Sequence[Turn], trained: Sequence[int]) -> Plan:
        ids, kinds = yield from self._spelling.spell(system, turns, trained)
        if ids[-1] in self._stops and kinds[-1] == Kind.COMPLETION:
            kinds[-1] = Kind.END
        else:
            ids.append(self._end)
            kinds.append(Kind.END)
        return Spelled(ids, kinds)

    def _fitted(self, spelled: Spelled) -> Spelled | None:
        counts, limit, length = self.counts, self.settings.max_length, len(spelled.ids)
        ids, kinds = spelled
        if self.settings.loss == "all":
            kinds = kinds.replace(PROMPT, COMPLETION)
        if length < self.settings.shortest:
            counts.too_short_articles += 1
            counts.too_short_tokens += length
            return None
        is_cut = limit is not None and length > limit
        if (is_cut and self.settings.truncation == "drop") or (self.settings.longest is not None and length > self.settings.longest):
            counts.too_long_articles += 1
            counts.too_long_tokens += length
            return None
        if limit is not None and is_cut:
            kept = slice(limit) if self.settings.truncation == "right" else slice(length - limit, None)
            ids, kinds = ids[kept], kinds[kept]
        # A lone end token teaches nothing.
        if not kinds.count(Kind.COMPLETION) and not self.settings.keep_untrained:
            counts.untrained_articles += 1
            counts.untrained_tokens += length
            return None
        if len(ids) < length:
            counts.truncated_articles += 1
            counts.truncated_tokens += length - len(ids)
        prompt = kinds.count(Kind.PROMPT)
        counts.articles += 1
        counts.prompt_tokens += prompt
        counts.completion_tokens += len(ids) - prompt
        return Spelled(ids, kinds)

    def _tokens(self, spelled: Spelled, category: str | None) -> Tokens:
        categories = None
        if self.categories is not None:
            number = -1 if category is None else self.categories.get(category, -1)
            categories = np.full(len(spelled.ids), number, np.int32)
        return Tokens(np.array(spelled.ids, np.int32), np.frombuffer(spelled.kinds, np.uint8).astype(np.int32), categories)


def instructions(example: Example, template: Template) -> str:
    """The system prompt of a dialogue: its own or else the template's, and its persona. Give `corolla chat --system` the same."""
    system = template.system if example.system is None else example.system
    persona = f"Your persona: {' '.join(example.persona)}" if example.persona else ""
    return "\n".join(filter(None, (system, persona)))
