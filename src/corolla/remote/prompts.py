"""Soft prompts: trained embeddings in front of every input, and, for deep prompt tuning, at every block's input."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from corolla.errors import InvalidSetting
from corolla.models.prompts import SoftPrompt

TuningMode = Literal["ptune", "deep_ptune"]


class SoftPrompts(nn.Module):
    """P soft tokens of width E, in float32 whatever the model computes in: small steps would be lost in bfloat16.

    Attributes:
        tokens: [P, E], what stands in front of the input's embeddings (Lester et al., 2021).
        deep: [B, P, E], what is added to the first P rows at each of B blocks' inputs; None without `deep_ptune`.
    """

    def __init__(self, tokens_PxE: torch.Tensor, blocks: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens_PxE.detach().float().clone())
        self.deep = None if blocks is None else nn.Parameter(torch.zeros(blocks, *tokens_PxE.shape, device=tokens_PxE.device))

    @classmethod
    def of(cls, prompt: SoftPrompt) -> SoftPrompts:
        """To be trained on from there."""
        prompts = cls(prompt.input, None if prompt.deep is None else len(prompt.deep))
        if prompts.deep is not None and prompt.deep is not None:
            prompts.deep.data.copy_(prompt.deep)
        return prompts

    def as_they_are(self) -> SoftPrompt:
        """A copy. Raises `PromptError` when there are values that are not finite."""
        tokens, deep = (None if rows is None else rows.detach().cpu().clone() for rows in (self.tokens, self.deep))
        assert tokens is not None
        return SoftPrompt(tokens, deep)

    def __len__(self) -> int:
        return len(self.tokens)


def soft_prompts(mode: TuningMode, length: int, embedding_VxE: torch.Tensor, blocks: int) -> SoftPrompts:
    """New ones: the embeddings of tokens drawn at random, and nothing added at the blocks yet.

    Raises `InvalidSetting` for another mode, or a length below 1.
    """
    if mode not in ("ptune", "deep_ptune"):
        raise InvalidSetting("tuning_mode", f"{mode!r} is neither 'ptune' nor 'deep_ptune'")
    if not (isinstance(length, int) and length > 0):
        raise InvalidSetting("pre_seq_len", f"{length!r} is not at least 1")
    drawn = torch.randint(len(embedding_VxE), (length,)).to(embedding_VxE.device)
    return SoftPrompts(embedding_VxE[drawn], blocks if mode == "deep_ptune" else None)
