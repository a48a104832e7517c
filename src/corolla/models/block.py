"""One transformer block over packed rows, for every supported family.

Rows are tokens of any sessions, side by side; only attention knows which belong together.

Legend: T rows, E hidden, H heads, K key heads, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional as F

from corolla.models.config import ModelConfig
from corolla.models.linear import Differentiable, Linear


class Attention(Protocol):
    """What a block asks of the cache: keep these keys and values, and attend to the session's."""

    def __call__(self, block: int, qkv_TxHKKxD: torch.Tensor) -> torch.Tensor:
        """Attention's output [T, H * D] for a block of the whole model's numbering."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Layer norm, or RMS norm (Zhang and Sennrich, 2019), with the weight in the working dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rms:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return torch.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """cos and sin [T, H + 2K, R] of the rows' positions; ones and zeros on the value heads, so that QKV turns as a whole.

    The halves that rotate_half negates carry their sign in `sin`.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, qkv_TxHKKxD: torch.Tensor) -> torch.Tensor:
        rotary_dim = self.cos.shape[-1]
        turned = qkv_TxHKKxD if rotary_dim == qkv_TxHKKxD.shape[-1] else qkv_TxHKKxD[..., :rotary_dim]
        turned = torch.addcmul(turned * self.cos, turned.roll(rotary_dim // 2, -1), self.sin)
        if rotary_dim == qkv_TxHKKxD.shape[-1]:
            return turned
        return torch.cat([turned, qkv_TxHKKxD[..., rotary_dim:]], dim=-1)


def rotations(arch: ModelConfig, positions_T: torch.Tensor, dtype: torch.dtype) -> tuple[Rotation, ...]:
    """The rotation of each of the architecture's ropes at these positions (int64), computed in float32 as transformers does."""
    made = []
    for rope in arch.ropes:
        angles = positions_T[:, None].float() * rope.inverse_frequencies
        cos = torch.cat([angles.cos(), angles.cos()], -1) * rope.factor
        sin = torch.cat([-angles.sin(), angles.sin()], -1) * rope.factor
        rows, rotary_dim = cos.shape
        turning = arch.heads + arch.kv_heads
        cos_full = torch.ones(rows, arch.qkv_heads, rotary_dim, dtype=dtype, device=cos.device)
        sin_full = torch.zeros_like(cos_full)
        cos_full[:, :turning] = cos.to(dtype)[:, None]
        sin_full[:, :turning] = sin.to(dtype)[:, None]
        made.append(Rotation(cos_full, sin_full))
    return tuple(made)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The weights of block `index` and its forward."""

    arch: ModelConfig
    index: int
    attention_norm: Norm
    mlp_norm: Norm | None
    qkv: Linear
    out: Linear
    up: Linear
    gate: Linear | None
    down: Linear
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its products."""
        return tuple(linear for linear in (self.qkv, self.out, self.up, self.gate, self.down) if linear is not None)

    def __call__(self, x_TxE: torch.Tensor, attention: Attention, turns: tuple[Rotation, ...]) -> torch.Tensor:
        normed = self.attention_norm(x_TxE)
        attended = attention(self.index, self._qkv(normed, turns))
        if self.attention_post_norm is not None:
            y_TxE = self.attention_post_norm(self.out(attended)).add_(x_TxE)
        else:
            y_TxE = self.out.added(attended, x_TxE)
        if self.mlp_norm is not None:
            normed = self.mlp_norm(x_TxE if self.arch.parallel else y_TxE)
        if self.gate is not None:
            inner = self.up.multiplied(normed, self.gate.activated(normed, self.arch.activation))
        else:
            inner = self.up.activated(normed, self.arch.activation)
        if self.mlp_post_norm is not None:
            return self.mlp_post_norm(self.down(inner)).add_(y_TxE)
        return self.down.added(inner, y_TxE)

    def differentiable(self) -> Block:
        """This block with gradients with respect to its rows; from a backward on it holds its weights widened, until `drop`."""
        gate = None if self.gate is None else Differentiable(self.gate)
        qkv, out, up, down = (Differentiable(linear) for linear in (self.qkv, self.out, self.up, self.down))
        return replace(self, qkv=qkv, out=out, up=up, gate=gate, down=down)

    def drop(self) -> None:
        """Let go of what a backward through a `differentiable` block has widened."""
        for linear in self.linears:
            if isinstance(linear, Differentiable):
                linear.drop()

    def _qkv(self, normed_TxE: torch.Tensor, turns: tuple[Rotation, ...]) -> torch.Tensor:
        arch = self.arch
        qkv = self.qkv(normed_TxE).view(normed_TxE.shape[0], arch.qkv_heads, arch.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = qkv.split([arch.heads, arch.kv_heads, arch.kv_heads], dim=1)
            qkv = torch.cat([self.query_norm(query), self.key_norm(key), value], dim=1)
        rope = arch.rope_of[self.index]
        return qkv if rope is None else turns[rope](qkv)
