"""Dialogues as what a prompt is trained on: articles with labels, some of them held out, in an order that a seed decides.

Legend: S sequences, N columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corolla.chat.templates import Template
from corolla.data.examples import Example
from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.data.render import Loss, Renderer, RenderSettings, Truncation
from corolla.data.sampling import is_held_out, sampled
from corolla.data.saving import sha256
from corolla.data.tokens import IGNORED, Tokens, TrainingTokenizer
from corolla.errors import DataError, InvalidSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Which dialogues are taken, and what of them is trained on.

    Args:
        data: a file, a directory of files or a dataset of the hub; `format` and `split` as `data.readers.read.read` takes them.
        loss: "answers" trains on the assistant's replies only, "all" on everything; never on padding.
        history: each reply is an example of its own, after so many turns; None trains a dialogue as a whole.
        max_length: tokens of an example; `truncation` says which end of a longer one goes.
        samples: dialogues, drawn by `seed`; None takes all.
        held_out: share of the dialogues that is kept from training, for the perplexities; `held_out_samples` of them are used.

    Raises `InvalidSetting` for a value outside its range.
    """

    data: str
    format: str | None = None
    split: str = "train"
    loss: Loss = "answers"
    history: int | None = None
    max_length: int = 256
    truncation: Truncation = "right"
    samples: int | None = None
    held_out: float = 0.05
    held_out_samples: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.rendering
        if self.samples is not None and self.samples < 1:
            raise InvalidSetting("samples", f"{self.samples} dialogues are too few; give at least 1")
        if not 0 <= self.held_out < 1:
            raise InvalidSetting("held-out", f"{self.held_out:g} is not from 0 to below 1")
        if self.held_out_samples < 1:
            raise InvalidSetting("held-out-samples", f"{self.held_out_samples} is not at least 1; --held-out 0 holds nothing out")

    @property
    def rendering(self) -> RenderSettings:
        return RenderSettings(max_length=self.max_length, truncation=self.truncation, loss=self.loss, history=self.history)


@dataclass(frozen=True, slots=True, eq=False)
class DialoguePart:
    """The dialogues of one side and their articles."""

    examples: list[Example]
    articles: list[Tokens] = field(default_factory=list)

    @property
    def described(self) -> dict[str, Any]:
        """As docs/tuning.md lists it."""
        hashed = hashlib.sha256()
        for article in self.articles:
            hashed.update(len(article).to_bytes(4, "little"))
            hashed.update(np.stack([article.input_ids, article.labels]).astype("<i4").tobytes())
        return {
            "examples": len(self.examples),
            "articles": len(self.articles),
            "tokens": sum(map(len, self.articles)),
            "trained_tokens": sum(int(article.trained.sum()) for article in self.articles),
            "digest": hashed.hexdigest(),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Dialogues:
    """What is trained on, and what is held out."""

    training: DialoguePart
    held_out: DialoguePart
    described: dict[str, Any]


def load_dialogues(settings: DataSettings, tokenizer: TrainingTokenizer, template: Template, problems: Problems) -> Dialogues:
    """Read, divided, drawn and rendered.

    Raises `DataError` for a source that is missing or damaged, or where nothing is left to train on; `InvalidSetting`, and what
    `Renderer` raises.
    """
    held_out: list[Example] = []

    def to_train_on() -> Iterator[Example]:
        for example in read(settings.data, problems, format=settings.format, split=settings.split):
            if is_held_out(example, settings.held_out, settings.seed):
                held_out.append(example)
            else:
                yield example

    training = list(to_train_on()) if settings.samples is None else sampled(to_train_on(), settings.samples, settings.seed)
    if not training:
        left = " that is not held out: lower --held-out" if held_out else ": see docs/data.md for the formats"
        raise DataError(f"{settings.data} has no dialogue{left}")
    if settings.held_out and not held_out:
        raise DataError(f"of the {len(training)} dialogues none is held out: raise --held-out, or give --held-out 0 to do without")
    drawn = sampled(held_out, settings.held_out_samples, settings.seed) if held_out else []
    parts = [_rendered(examples, settings, tokenizer, template, problems) for examples in (training, drawn)]
    path = Path(settings.data)
    described = {
        "source": settings.data,
        "sha256": sha256(path) if path.is_file() else None,
        "training": parts[0].described,
        "held_out": parts[1].described,
    }
    return Dialogues(parts[0], parts[1], described)


def _rendered(
    examples: list[Example], settings: DataSettings, tokenizer: TrainingTokenizer, template: Template, problems: Problems
) -> DialoguePart:
    renderer = Renderer(tokenizer, template, settings.rendering)
    part = DialoguePart(examples, list(renderer.render_all(examples, problems)))
    if examples and not part.articles:
        counts = renderer.counts
        if counts.too_long_articles:
            raise DataError(f"every dialogue of {settings.data} is longer than {settings.max_length} tokens: raise --max-length")
        if counts.untrained_articles and settings.truncation == "right":
            raise DataError(f"no dialogue of {settings.data} has a reply in its first {settings.max_length} tokens: raise --max-length")
        raise DataError(f"no dialogue of {settings.data} has a reply to train on: see docs/data.md for the formats")
    return part


def in_order(articles: Sequence[Tokens], steps: int, batch: int, seed: int) -> list[Tokens]:
    """The articles of `steps` batches: all of them in an order of its own for each epoch, the next one from where the last ended.

    Nothing else draws from these random numbers, so that what a step trains on depends on the seed and the step alone.
    """
    order: list[Tokens] = []
    generator = torch.Generator().manual_seed(seed)
    while len(order) < steps * batch:
        order += [articles[index] for index in torch.randperm(len(articles), generator=generator).tolist()]
    return order[: steps * batch]


def collate(articles: Sequence[Tokens]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right: `input_ids`, `attention_mask` and `labels`, int64 [S, N]. Padding has the label `IGNORED`."""
    size = len(articles), max(map(len, articles))
    ids, mask, labels = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long), torch.full(size, IGNORED)
    for row, article in enumerate(articles):
        ids[row, : len(article)] = torch.from_numpy(article.input_ids)
        mask[row, : len(article)] = 1
        labels[row, : len(article)] = torch.from_numpy(article.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
