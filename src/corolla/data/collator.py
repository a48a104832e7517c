"""Sequences of several articles as a batch of tensors in which no article attends to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from corolla.errors import InvalidSetting

if TYPE_CHECKING:
    import torch

Mask = Literal["positions", "block", "none"]


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """A list of `dataset.Item` as a batch: `input_ids`, `labels`, `position_ids`, int64 `[B, T]`.

    `mask` keeps articles apart: with `positions` there is no `attention_mask`, and a model of transformers that knows
    `position_ids` masks by them (`masking_utils.find_packed_sequence_indices`); with `block` `attention_mask` is bool
    `[B, 1, T, T]`, true where the third axis may attend to the fourth, for models that take such a mask; with `none` articles see those
    before them, as BLOOMChat was trained, and there is neither. `use_cache` is false in every batch: with a cache, even an empty one,
    transformers does not look for articles in the positions, and they would see one another in silence.

    Raises `InvalidSetting` for another `mask`.
    """

    mask: Mask = "positions"

    def __post_init__(self) -> None:
        if self.mask not in get_args(Mask):
            raise InvalidSetting("mask", f"there is no {self.mask!r}; there are {', '.join(get_args(Mask))}")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor | bool]:
        import torch

        names = ("input_ids", "labels") if self.mask == "none" else ("input_ids", "labels", "position_ids")
        batch: dict[str, torch.Tensor | bool] = {"use_cache": False}
        batch |= {name: torch.from_numpy(np.stack([np.asarray(item[name], np.int64) for item in items])) for name in names}
        if self.mask == "block":
            articles = torch.from_numpy(np.stack([np.asarray(item["position_ids"]) for item in items]) == 0).cumsum(dim=1)
            same = articles[:, None, :, None] == articles[:, None, None, :]
            batch["attention_mask"] = same.tril()
        return batch
