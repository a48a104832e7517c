"""Sequences of packed articles side by side as a model's inputs, so that no article sees another.

Legend: S sequences, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from corolla.data.dataset import Item, item
from corolla.data.tokens import IGNORED, Kind, Tokens, count
from corolla.errors import InvalidSetting
from corolla.tuning.bloom import keep_articles_apart

SEQUENCES = "sequences"  # the numbers of a batch's sequences, which no model takes


class Numbered(NamedTuple):
    """A sequence and its number in the data, so that what is wrong with it can be named."""

    number: int
    tokens: Tokens


class SequenceDataset(Dataset[Numbered]):
    """Packed sequences in memory, as torch's loaders want them."""

    def __init__(self, sequences: Sequence[Tokens]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Numbered:
        return Numbered(index, self.sequences[index])


@dataclass(frozen=True, slots=True)
class Collator:
    """A batch for `forward`: `input_ids` and `labels` int64 `[S, N]`, and what keeps the articles of a sequence apart.

    N is that of the longest sequence without its padding. Labels are `IGNORED` where nothing is trained on, and at the first token
    of an article, which the article before would have to predict. Where every sequence is one article the causal mask is enough;
    else there are `position_ids` [S, N] that begin at 0 with each article, from which transformers derives the mask, or, for the
    families of `wants_mask`, an additive mask [S, 1, N, N] of `mask_dtype`.
    """

    pad_id: int
    wants_mask: bool = False
    mask_dtype: torch.dtype = torch.float32

    def __call__(self, batch: Sequence[Numbered]) -> dict[str, torch.Tensor]:
        rows = [_without_padding(entry.tokens) for entry in batch]
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        fills = {"input_ids": self.pad_id, "labels": IGNORED, "position_ids": 0}
        columns = {name: np.full(shape, fill, np.int64) for name, fill in fills.items()}
        for index, row in enumerate(rows):
            for name, column in columns.items():
                column[index, : len(row["input_ids"])] = row[name]  # type: ignore[literal-required]
        inputs = {name: torch.from_numpy(column) for name, column in columns.items()}
        inputs[SEQUENCES] = torch.tensor([entry.number for entry in batch])
        positions = inputs.pop("position_ids")
        if any((row["position_ids"][1:] == 0).any() for row in rows):
            inputs |= {"attention_mask": self._mask(positions)} if self.wants_mask else {"position_ids": positions}
        return inputs

    def _mask(self, positions: torch.Tensor) -> torch.Tensor:
        articles = (positions == 0).cumsum(1)
        seen = (articles[:, None, :, None] == articles[:, None, None, :]).tril()
        return torch.zeros(seen.shape, dtype=self.mask_dtype).masked_fill(~seen, torch.finfo(self.mask_dtype).min)


def _without_padding(sequence: Tokens) -> Item:
    return item(sequence[: len(sequence) - count(sequence, Kind.PADDING)])


def wants_mask(model: torch.nn.Module) -> bool:
    """Whether the family needs the mask itself. Raises `InvalidSetting` for one that cannot keep articles apart.

    transformers derives the mask from position ids wherever a family takes them. BLOOM takes none, and is taught to keep them apart.
    """
    config: Any = model.config
    if config.model_type == "bloom":
        keep_articles_apart(model)
        return True
    if getattr(config, "alibi", False):
        problem = "a model of this family (with ALiBi) would let articles see one another: give --set packing=single"
        raise InvalidSetting("packing", problem)
    return False
