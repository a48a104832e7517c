"""How much of a model this machine's memory holds."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import psutil
import torch

from corolla.errors import InvalidSetting
from corolla.models.checkpoint import Checkpoint
from corolla.models.config import ModelConfig
from corolla.models.linear import WeightFormat
from corolla.models.quantized_files import stored_format
from corolla.models.quantized_tensor import INT4_GROUP, NF4_BLOCK
from corolla.types import Span

_CPU_SHARE, _CUDA_SHARE = 0.8, 0.9  # of what is available; the rest is for activations, and for a tensor while it is converted
_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that a span takes: its weights, its KV cache when full, and what the ends of the model need beside it."""

    blocks: int  # of the whole model
    block: int  # one block's weights, the largest
    cache: int  # one block's KV cache
    embedding: int
    head: int

    def of(self, span: Span) -> int:
        """Bytes of the span."""
        ends = self.embedding * (span.start == 0) + self.head * (span.end == self.blocks)
        return len(span) * (self.block + self.cache) + ends

    def capacity(self, memory: int) -> int:
        """How many blocks `memory` bytes hold, wherever in the model they lie. Raises `InvalidSetting` when that is none."""
        if self.of(Span(0, self.blocks)) <= memory:
            return self.blocks
        fit = (memory - max(self.embedding, self.head)) // (self.block + self.cache)
        if fit < 1:
            least = self.block + self.cache + max(self.embedding, self.head)
            raise InvalidSetting(
                "memory",
                f"a block of this model, its cache and the embedding or head beside it take {least / _GIB:.3g} GiB and there are "
                f"{memory / _GIB:.3g}: give more, int8 weights or a smaller cache",
            )
        return min(fit, self.blocks - 1)

    def check(self, span: Span, memory: int) -> None:
        """Raises `InvalidSetting` when `memory` bytes do not hold the span."""
        if self.of(span) > memory:
            needed = f"blocks {span} and their cache take {self.of(span) / _GIB:.3g} GiB and there are {memory / _GIB:.3g}"
            raise InvalidSetting("memory", f"{needed}: give more, fewer blocks, int8 weights or a smaller cache")


def footprint(checkpoint: Checkpoint, arch: ModelConfig, *, dtype: torch.dtype, weights: WeightFormat, cache_tokens: int) -> Footprint:
    """What spans of a checkpoint take with weights held as `weights`, computed in `dtype`, and a cache of `cache_tokens` positions.

    Known from the headers of its files alone; nothing is loaded.
    """
    names, quantized = arch.names, stored_format(checkpoint) is not None
    stored = getattr(checkpoint.config, "dtype", None) or torch.float32  # in which the embedding stays
    in_block = re.compile(rf"(?:{'|'.join(map(re.escape, names.prefixes))}){re.escape(names.blocks)}\.(\d+)\..+")
    of_block: Counter[int] = Counter()
    for name in checkpoint.names:
        if (match := in_block.fullmatch(name)) is not None:
            block = int(match[1])
            of_block[block] += checkpoint.nbytes(name) if quantized else _nbytes(checkpoint.shape(name), dtype, weights, stored)
    table = (arch.vocabulary, arch.hidden)
    return Footprint(
        blocks=arch.blocks,
        block=max(of_block.values(), default=0),
        cache=cache_tokens * 2 * arch.kv_heads * arch.head_dim * dtype.itemsize,
        embedding=math.prod(table) * stored.itemsize,
        head=_nbytes(table, dtype, {"int4": "int8", "nf4": "packed"}.get(weights, weights), stored),  # type: ignore[arg-type]
    )


def available(device: str) -> int:
    """Bytes that a span may take on `device`: a share of what is available there now."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    return int(psutil.virtual_memory().available * _CPU_SHARE)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype, weights: WeightFormat, stored: torch.dtype) -> int:
    """Bytes of a tensor as `models.linear` keeps it; a vector is in `dtype`, and so is a matrix that may not fit half precision."""
    size = math.prod(shape)
    if len(shape) == 2 and weights == "packed" and (dtype, stored) == (torch.float32, torch.float16):
        return size * 2
    if len(shape) != 2 or weights in ("plain", "packed"):
        return size * dtype.itemsize
    outputs, inputs = shape
    if weights == "nf4" and size % NF4_BLOCK == 0:
        return size // 2 + 4 * (size // NF4_BLOCK)
    if weights == "int4" and inputs % INT4_GROUP == 0 and outputs % 16 == 0:
        return size // 2 + 2 * (size // INT4_GROUP) * dtype.itemsize
    return size + outputs * dtype.itemsize
