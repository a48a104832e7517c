"""What a model's blocks compute, as data: one frozen `ModelConfig` for every supported family.

`models/families.py` reads it off a transformers config; `models/block.py` computes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary position embedding (Su et al., 2021): frequencies [rotary_dim / 2] in float32, and a factor on cos and sin."""

    inverse_frequencies: torch.Tensor
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Where a family keeps its tensors: names within a block (without ".weight"), and the names outside.

    `prefixes` are the possible roots of the decoder, for checkpoints saved from the model with and without its head.
    """

    blocks: str  # of the list of blocks, below the root
    embedding: str
    final_norm: str
    head: str  # from the checkpoint's top, not below the root
    prefixes: tuple[str, ...]
    qkv: tuple[str, ...]  # one fused name, or three
    out: str
    down: str
    up: str
    gate: str | None
    attention_norm: str
    mlp_norm: str | None  # None: the MLP reads what attention reads
    embedding_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelConfig:
    """The mathematics of one model. `window[i]` and `rope_of[i]` belong to block i of the whole model."""

    family: str
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context_length: int
    names: TensorNames
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_offset: float = 0.0  # added to a norm's weight: Gemma stores weight - 1
    activation: Activation
    parallel: bool = False  # attention and MLP read the same input (GPT-J's parallel residual)
    grouped_qkv: bool = False  # a fused QKV is stored as [kv_heads, heads / kv_heads + 2, head_dim]
    tied: bool  # the head is the embedding
    scale: float  # of the attention's scores
    window: tuple[int | None, ...]  # how many last positions a block attends to
    ropes: tuple[Rope, ...] = ()
    rope_of: tuple[int | None, ...] = field(default=())
    alibi: torch.dtype | None = None  # ALiBi (Press et al., 2022), its products rounded to this dtype
    alibi_scale: float = 1.0
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """The shape [outputs, inputs] of each product of a block, by its name in `models.block.Block`."""
        attended = self.heads * self.head_dim
        products = {
            "qkv": (self.qkv_heads * self.head_dim, self.hidden),
            "out": (self.hidden, attended),
            "up": (self.intermediate, self.hidden),
            "gate": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }
        return {name: shape for name, shape in products.items() if name != "gate" or self.names.gate is not None}

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def qkv_heads(self) -> int:
        return self.heads + 2 * self.kv_heads

    def ungrouped(self, fused: torch.Tensor) -> torch.Tensor:
        """The rows of a fused QKV, stored by groups of heads, as [H query heads, K key heads, K value heads] of D."""
        grouped = fused.view(self.kv_heads, self.group + 2, self.head_dim, *fused.shape[1:])
        parts = grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]
        return torch.cat([part.reshape(-1, *fused.shape[1:]) for part in parts])
