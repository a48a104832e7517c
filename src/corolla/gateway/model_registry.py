"""The models that a gateway answers with, as it sees them: a way to the swarm, a tokenizer, and what the files say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corolla.chat.templates import Template, default_template, stop_ids, template_named
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import ModelNotFound, PromptTooLong
from corolla.models.catalog import describe
from corolla.models.checkpoint import json_object
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import gaps
from corolla.swarm.transport import Transport
from corolla.types import Span

_LONGEST_TOKEN = 32  # characters: a text of more of them for each position of the context is not even tokenized


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model: connect to `peer` over `transport`. `records` tells its servers; `round_trips` this process's own, in seconds by peer."""

    name: str
    directory: Path
    tokenizer: TextTokenizer
    template: Template
    context_length: int
    blocks: int
    family: str
    vocabulary: int
    transport: Transport
    peer: str
    records: Callable[[], Sequence[ServerRecord]]
    round_trips: Callable[[], dict[str, float]] = field(default=dict)
    counters: Callable[[], dict[str, int]] = field(default=dict)
    failure: Callable[[], str | None] = field(default=lambda: None)  # why this process reaches no server any more

    @property
    def missing(self) -> tuple[Span, ...]:
        """The blocks that no ready server holds."""
        now = time.time()
        return gaps([record for record in self.records() if record.state == "ready" and record.expires > now], self.blocks)

    @property
    def most_characters(self) -> int:
        """More of them have no room in the context, however they are tokenized."""
        return self.context_length * _LONGEST_TOKEN

    def template_or_default(self, name: str | None) -> Template:
        """Raises `InvalidSetting` where there is no such template."""
        return self.template if name is None else template_named(name)

    def stop_ids(self, template: Template | None = None) -> tuple[int, ...]:
        """The tokens that end an answer: the model's own, and those of a template."""
        return self.tokenizer.end_ids if template is None else stop_ids(template, self.tokenizer)

    def check_size(self, *texts: str) -> None:
        """Raises `PromptTooLong` for more characters than any tokens of the context could spell, before they are tokenized."""
        characters = sum(map(len, texts))
        if characters > self.most_characters:
            raise PromptTooLong(characters // _LONGEST_TOKEN, self.context_length)

    def check_room(self, tokens: int) -> int:
        """How many tokens an answer to a prompt of so many may have. Raises `PromptTooLong` where there is no room for one."""
        if tokens >= self.context_length:
            raise PromptTooLong(tokens, self.context_length)
        return self.context_length - tokens


def served_model(
    name: str,
    directory: Path,
    transport: Transport,
    peer: str,
    context_length: int,
    records: Callable[[], Sequence[ServerRecord]],
    *,
    round_trips: Callable[[], dict[str, float]] = dict,
    counters: Callable[[], dict[str, int]] = dict,
    failure: Callable[[], str | None] = lambda: None,
) -> ServedModel:
    """The model whose tokenizer and config lie in `directory`. Raises `CheckpointError` where they do not."""
    tokenizer = TextTokenizer(directory)
    described = describe(name, directory)
    config = json_object(directory / "config.json")
    return ServedModel(
        name=name,
        directory=directory,
        tokenizer=tokenizer,
        template=default_template(tokenizer, name),
        context_length=context_length,
        blocks=described.blocks or 0,
        family=described.family or "",
        vocabulary=int(config.get("vocab_size", 0)),
        transport=transport,
        peer=peer,
        records=records,
        round_trips=round_trips,
        counters=counters,
        failure=failure,
    )


class Models:
    """The served models by name; the first one is what a request gets that names none."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._by_name = {model.name: model for model in models}

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._by_name.values())

    def named(self, name: str | None) -> ServedModel:
        """Raises `ModelNotFound`."""
        if not name:
            return next(iter(self._by_name.values()))
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelNotFound(f"there is no model {name!r} here; there are {', '.join(self._by_name)}") from None
