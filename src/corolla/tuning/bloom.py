"""The stock BLOOM taught to train packed articles, and to train them quicker: the same function, up to rounding.

Legend: S sequences, N columns, H heads, D head_dim.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import functional


def keep_articles_apart(model: torch.nn.Module) -> None:
    """Let a mask of four dimensions count each article's positions from 0; the stock module makes ALiBi of a mask [S, N] only."""
    bloom = next(module for module in model.modules() if type(module).__name__ == "BloomModel")
    bloom.build_alibi_tensor = MethodType(_alibi, bloom)  # type: ignore[assignment]


def quicken(model: torch.nn.Module) -> None:
    """Exchange BLOOM's GELU of ten operations for torch's, which is of the same formula, and its attention for torch's fused one.

    Other families, whose stock modules have both, are left as they are; so is a BLOOM whose attention drops out.
    """
    bias = _Bias()
    module: Any
    for module in model.modules():
        if type(module).__name__ == "BloomMLP":
            module.gelu_impl = torch.nn.GELU(approximate="tanh")
        elif type(module).__name__ == "BloomAttention" and not module.attention_dropout.p and module.pretraining_tp == 1:
            module.forward = MethodType(_attention, module)
            module.bias_of = bias


class _Bias:
    """ALiBi and the mask in one, [S, H, N, N]; the blocks of a forward share it."""

    def __init__(self) -> None:
        self._made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, alibi: torch.Tensor, mask: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        made = self._made
        if made is None or made[0] is not alibi or made[1] is not mask or made[2].dtype != dtype:
            whole = alibi.view(-1, heads, 1, alibi.shape[-1]).to(dtype) + mask.to(dtype)
            made = self._made = (alibi, mask, whole)
        return made[2]


def _attention(
    self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: torch.Tensor, attention_mask: torch.Tensor | None, **others: Any
) -> tuple[torch.Tensor, None]:
    """`BloomAttention.forward` without a cache."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if attention_mask is None:  # nothing but what lies ahead is masked
        length = query.shape[2]
        attention_mask = torch.full((length, length), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device).triu(1)
    bias = self.bias_of(alibi, attention_mask, self.num_heads, query.dtype)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.inv_norm_factor)
    output = self.dense(attended.transpose(1, 2).flatten(2))
    return residual + functional.dropout(output, p=self.hidden_dropout, training=self.training), None


def _alibi(self: Any, attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """ALiBi [S * heads, 1, N] (Press et al., 2022) for keys at their positions within their article."""
    if attention_mask.ndim == 2:
        built: torch.Tensor = type(self).build_alibi_tensor(self, attention_mask, num_heads, dtype)
        return built
    positions = (attention_mask == 0).sum(-1).squeeze(1) - 1  # a token sees those before it and itself
    unit = type(self).build_alibi_tensor(self, torch.ones(1, 2, device=attention_mask.device), num_heads, torch.float32)
    slopes = unit[:, 0, 1]
    return (slopes[None, :, None] * positions[:, None, :]).reshape(-1, 1, positions.shape[-1]).to(dtype)
