"""The tensors of the KV cache: for each block and head a pool of rows, one row a position.

A head's rows lie together, because attention reads one head at a time: at 4,096 positions, out of memory, a block of SmolLM2
takes 0.56 ms so, and 1.05 ms with the heads of a position together.

Legend: P slots (pages * page size), K key heads, D head_dim.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from corolla.models.config import ModelConfig
from corolla.types import Span


class KVCache:
    """Keys and values of every block of a span, [2K, P, D] each: K keys, then K values; behind them a page that nobody reads.

    Memory is taken from the system as pages are first written, not at construction.
    """

    def __init__(self, arch: ModelConfig, span: Span, slots: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.page_size = page_size
        self.spare_slot = slots  # where padded rows of a fixed shape may write
        self._span = span
        shape = (2 * arch.kv_heads, slots + page_size, arch.head_dim)
        self._blocks = [_untouched(shape, dtype, device) for _ in range(len(span))]
        self.bytes_per_token = len(span) * 2 * arch.kv_heads * arch.head_dim * dtype.itemsize

    def of(self, block: int) -> torch.Tensor:
        """The rows [2K, P, D] of a block, by the whole model's numbering."""
        return self._blocks[block - self._span.start]

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, as (from, to), in every block."""
        size = self.page_size
        for rows in self._blocks:
            for source, target in pairs:
                rows[:, target * size : (target + 1) * size] = rows[:, source * size : (source + 1) * size]


def _untouched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory the system hands out on first write (`torch.zeros` would write it all)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
