"""Weights as codes of 8 or 4 bits: made from a matrix, put side by side, and given back.

- `int8`: symmetric, one scale a row.
- `int4`: asymmetric in groups of 32 inputs: `low + code * scale`, as torch's CPU kernel computes it.
- `nf4`: codes of 64 values in a row share their largest magnitude; a code stands for a quantile of the normal distribution (QLoRA,
  Dettmers et al., 2023). Code for code what bitsandbytes makes of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Literal

import torch

from corolla.errors import UnsupportedModel

QuantizedFormat = Literal["int8", "int4", "nf4"]
INT4_GROUP = 32
NF4_BLOCK = 64
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_AT_ONCE = 2**22  # values that are quantized at a time, some 80 MB of working memory
_MIDPOINTS = tuple((low + high) / 2 for low, high in pairwise(NF4_VALUES))


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A matrix of `shape` (outputs, inputs) in a format; products with it are in `dtype`.

    `codes` are int8 [out, in], or uint8 [out * in / 2], two codes a byte, the earlier one in its upper half. `scale` is float32:
    [out], [out, in / 32], or [out * in / 64] (of blocks along the rows, which may reach over a row's end). `low` is float32
    [out, in / 32], of int4.
    """

    format: QuantizedFormat
    shape: tuple[int, int]
    dtype: torch.dtype
    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as they are here."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.low is None else self.low.nbytes)

    def unpacked(self) -> torch.Tensor:
        """The codes [out, in], a byte each (uint8; int8 for int8)."""
        if self.format == "int8":
            return self.codes
        return torch.stack([self.codes >> 4, self.codes & 15], -1).view(self.shape)

    def widened(self) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for, in `dtype`; computed in float32."""
        outputs, inputs = self.shape
        codes = self.unpacked()
        if self.format == "int8":
            wide = codes.float() * self.scale[:, None]
        elif self.low is not None:
            wide = codes.float().view(outputs, -1, INT4_GROUP) * self.scale[..., None] + self.low[..., None]
        else:
            values = nf4_values(codes.device)[codes.int()]
            wide = values.view(-1, NF4_BLOCK) * self.scale.view(-1, 1)
        return wide.view(outputs, inputs).to(self.dtype)

    def rows(self, order: torch.Tensor) -> QuantizedTensor:
        """The rows in another order (int64 [out']). Raises `UnsupportedModel` where a block of nf4 reaches over the end of a row."""
        inputs = self.shape[1]
        if self.format == "nf4" and inputs % NF4_BLOCK:
            raise UnsupportedModel(f"nf4 keeps {NF4_BLOCK} inputs together, and rows of {inputs} cannot be parted: use int8")
        shape = (len(order), inputs)
        codes, scale = (part.view(self.shape[0], -1)[order] for part in (self.codes, self.scale))
        if self.format == "int8":
            return replace(self, shape=shape, codes=codes, scale=scale[:, 0])
        return replace(
            self,
            shape=shape,
            codes=codes.flatten(),
            scale=scale.flatten() if self.low is None else scale,
            low=None if self.low is None else self.low[order],
        )


@cache
def nf4_values(device: torch.device) -> torch.Tensor:
    """The values that codes of nf4 stand for, in float32 on the device: made once, as a copy to a GPU cannot be captured in a graph."""
    return torch.tensor(NF4_VALUES, device=device)


def joined(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Matrices of one format and of as many inputs, below one another. Raises `UnsupportedModel` like `QuantizedTensor.rows`."""
    first = parts[0]
    if first.format == "nf4" and any(part.codes.numel() * 2 % NF4_BLOCK for part in parts):
        raise UnsupportedModel(f"nf4 keeps {NF4_BLOCK} values together, and matrices of other sizes cannot be joined: use int8")
    return replace(
        first,
        shape=(sum(part.shape[0] for part in parts), first.shape[1]),
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        low=None if first.low is None else torch.cat([part.low for part in parts if part.low is not None]),
    )


def fits(format: QuantizedFormat, shape: tuple[int, int]) -> bool:
    """Whether a matrix of this shape can be kept in the format; where not, int8 always can."""
    outputs, inputs = shape
    if format == "int4":
        return inputs % INT4_GROUP == 0 and outputs % 16 == 0
    return format == "int8" or outputs * inputs % NF4_BLOCK == 0


def quantize(weight: torch.Tensor, format: QuantizedFormat) -> QuantizedTensor:
    """A matrix [out, in] (float32, bfloat16 or float16) as codes, computed in float32; int8 where it does not fit the format.

    Some rows at a time, so that little more than the matrix and its codes is held.
    """
    shape = (weight.shape[0], weight.shape[1])
    if not fits(format, shape):
        format = "int8"
    # A band's blocks of nf4 end where its rows do.
    rows = max(1, _AT_ONCE // shape[1] // NF4_BLOCK) * NF4_BLOCK
    return joined([_quantize(band, format) for band in weight.split(rows)])


def _quantize(weight: torch.Tensor, format: QuantizedFormat) -> QuantizedTensor:
    shape = (weight.shape[0], weight.shape[1])
    wide = weight.float()
    if format == "int8":
        scale = wide.abs().amax(1).clamp_(min=1e-12) / 127
        return QuantizedTensor("int8", shape, weight.dtype, (wide / scale[:, None]).round_().to(torch.int8), scale)
    if format == "int4":
        groups = wide.view(shape[0], -1, INT4_GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp_(min=1e-12)
        codes = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, 15).to(torch.uint8)
        return QuantizedTensor(format, shape, weight.dtype, pack(codes), scale, low)
    blocks = wide.reshape(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1)
    midpoints = torch.tensor(_MIDPOINTS, device=weight.device)
    codes = torch.bucketize(blocks / scale.clamp(min=1e-38)[:, None], midpoints, out_int32=True).to(torch.uint8)
    return QuantizedTensor(format, shape, weight.dtype, pack(codes), scale)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes from 0 to 15 (uint8, any shape, an even number of them), two a byte."""
    pairs = codes.reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]
