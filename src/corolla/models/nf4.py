"""Products with nf4 weights, by bitsandbytes' kernels where they are installed.

Measured on one core (1536 x 576, ms at 1 / 8 / 32 rows): bfloat16 .083 / .126 / .32; bitsandbytes' product .059 / .137 / .43.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from corolla.models.quantized_tensor import NF4_BLOCK, QuantizedTensor, nf4_values, quantize

_MOST_ROWS = 32  # of bitsandbytes' CPU product; above them widening the weight once is quicker
_BAND = 32  # rows that its layout puts side by side


class NF4:
    """A weight [out, in] in nf4, on any device.

    On a CPU with AVX512-bf16, products of few rows in bfloat16 are bitsandbytes' own; others widen the weight for the product.
    """

    def __init__(self, weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None) -> None:
        codes = weight if isinstance(weight, QuantizedTensor) else quantize(weight, "nf4")
        self._bias, self._codes = bias, codes
        self._few: Any = None
        outputs, inputs = codes.shape
        device, library = codes.codes.device, _library()
        nf4_values(device)  # before a graph is captured
        if library is None or inputs % NF4_BLOCK:
            return
        if device.type == "cuda":
            self._few = self._single
        elif codes.dtype == torch.bfloat16 and outputs % _BAND == 0 and library.has_avx512bf16():
            # One layout only: a second copy would take as much as int8 does.
            self._banded = _banded(codes)
            self._scale_by_block = codes.scale.view(outputs, -1).t().to(torch.bfloat16).contiguous()
            self._few, self._codes = self._banded_product, None  # type: ignore[assignment]
            self._shape = codes.shape

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] times the weight, [rows, out], with the bias."""
        if self._few is not None and (y := self._few(x)) is not None:
            return y if self._bias is None else y.add_(self._bias)
        return F.linear(x, self.widened(), self._bias)

    def widened(self) -> torch.Tensor:
        """The weight [out, in] in the working dtype."""
        if self._codes is not None:
            return self._codes.widened()
        outputs, inputs = self._shape
        values = nf4_values(self._banded.device).to(torch.bfloat16)
        # A byte holds the value at one place of a band's first half, and that of its second half above it.
        halves = torch.stack([values[(self._banded & 15).int()], values[(self._banded >> 4).int()]], -2)
        wide = halves.view(outputs // _BAND, inputs // 2, _BAND, 2).transpose(1, 2).reshape(outputs, -1, NF4_BLOCK)
        return (wide * self._scale_by_block.t()[..., None]).view(outputs, inputs)

    def _banded_product(self, x: torch.Tensor) -> torch.Tensor | None:
        if x.shape[0] > _MOST_ROWS:
            return None
        y: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit(
            x.contiguous(), self._banded, self._shape, self._scale_by_block, nf4_values(x.device), NF4_BLOCK
        )
        return y

    def _single(self, x: torch.Tensor) -> torch.Tensor | None:
        if x.shape[0] > 1:
            return None
        codes = self._codes
        y: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit(
            x, codes.codes.view(-1, 1), codes.shape, codes.scale, nf4_values(x.device), NF4_BLOCK
        )
        return y


def _banded(codes: QuantizedTensor) -> torch.Tensor:
    """uint8 [out * in / 64, 32]: of 32 rows at a time, pairs of inputs one after another; 64 codes are 32 bytes, the second half above
    the first. What bitsandbytes' CPU product reads."""
    outputs, inputs = codes.shape
    ordered = codes.unpacked().view(outputs // _BAND, _BAND, inputs // 2, 2).transpose(1, 2).reshape(-1, 2, _BAND)
    return ((ordered[:, 1] << 4) | ordered[:, 0]).contiguous()


@cache
def _library() -> Any:
    """bitsandbytes' functions, which register its operators; None where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a download that it would rather make
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        return None
