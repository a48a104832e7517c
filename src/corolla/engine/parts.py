"""What an engine is put together from. Another implementation may take each part's place: a better guess, or one that fails in a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from corolla.engine.attention import PagedAttention, SequenceRows
from corolla.engine.converting import Convert, converted
from corolla.engine.kv_cache import KVCache
from corolla.engine.page_pool import PagePool
from corolla.engine.sampler import sample
from corolla.engine.speculation import Guess, Sample, guess
from corolla.models.block import Attention
from corolla.models.config import ModelConfig

Attend = Callable[[ModelConfig, KVCache, Sequence[SequenceRows], int, torch.device, bool], Attention]
"""A step's attention; the arguments are those of `PagedAttention.of`."""


def paged_attention(
    arch: ModelConfig, cache: KVCache, rows: Sequence[SequenceRows], padded: int, device: torch.device, invariant: bool
) -> Attention:
    return PagedAttention.of(arch, cache, rows, padded, device, invariant=invariant)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    guess: Guess = guess  # which tokens may follow: a better one makes answers quicker and changes nothing in them
    sample: Sample = sample
    attend: Attend = paged_attention
    pool: Callable[[int, int], PagePool] = PagePool  # of so many pages of so many positions
    convert: Convert = converted
