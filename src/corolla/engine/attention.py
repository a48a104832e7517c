"""Attention of one step over the paged cache.

A step's rows belong to several sessions. They are attended in groups: a session with many rows (prefill) alone, sessions
with one row each (decode) together. Keys are read where they lie when a session's pages follow one another, else gathered.
With grouped queries, the query heads that share a key head take the place of query rows, so that keys are read once.

Legend: T rows, S sessions, N rows of one session, L cached positions, H query heads, K key heads, G = H / K, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch.nn import functional as F

from corolla.engine.kv_cache import KVCache
from corolla.engine.page_pool import PageTable
from corolla.models.config import ModelConfig

# In the batch-invariant mode keys are padded to this many positions: the size of the blocks in which torch's CPU kernel reduces.
INVARIANT_KEYS = 512
# A decoding row over this many keys attends to them in chunks side by side: there are more chunks than key heads, so all cores
# are used (at 4,096 keys, out of memory, 0.42 ms a block of SmolLM2 instead of 0.56), and a few runs of pages need no gather.
LONG_KEYS, CHUNK_KEYS, MOST_RUNS = 1024, 512, 8
# So many rows of one session attend one by one, with the bits that each would have alone: guesses change nothing, in bfloat16 either.
FEW_ROWS = 4


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """`count` consecutive positions of one session from `start`; its table already holds room for them."""

    table: PageTable
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class PagedAttention:
    """`models.block.Attention` for one step: writes the rows' keys and values, attends, returns [padded T, H * D].

    Args:
        slots: where the rows' keys and values go [T], int64.
        groups: what attends to what; together they cover the T rows.
        padded: rows that the blocks compute; those past T are padding and come back as zeros.
    """

    def __init__(self, arch: ModelConfig, cache: KVCache, slots_T: torch.Tensor, groups: Sequence[Group], padded: int) -> None:
        self._arch, self._cache = arch, cache
        self._slots, self._groups = slots_T, groups
        self._count, self._padded = slots_T.shape[0], padded

    @classmethod
    def of(
        cls, arch: ModelConfig, cache: KVCache, rows: Sequence[SequenceRows], padded: int, device: torch.device, *, invariant: bool
    ) -> PagedAttention:
        """For these sessions' rows; `invariant` attends each row in shapes that do not depend on what is in the batch."""
        slots = torch.tensor([slot for r in rows for slot in r.table.slots(r.start, r.end)], device=device)
        groups = _invariant_groups(arch, cache, rows, device) if invariant else _groups(arch, cache, rows, device)
        return cls(arch, cache, slots, groups, padded)

    def __call__(self, block: int, qkv_TxHKKxD: torch.Tensor) -> torch.Tensor:
        arch, count = self._arch, self._count
        pool = self._cache.of(block)
        real = qkv_TxHKKxD[:count] if self._padded != count else qkv_TxHKKxD
        pool.index_copy_(1, self._slots, real[:, arch.heads :].transpose(0, 1))
        query, window = real[:, : arch.heads], arch.window[block]
        if len(self._groups) == 1 and self._padded == count:
            return self._groups[0].attend(query, pool, window).reshape(count, -1)
        out = query.new_zeros(self._padded, arch.heads, arch.head_dim)
        for group in self._groups:
            out[group.rows] = group.attend(query[group.rows], pool, window)
        return out.view(self._padded, -1)


class Group(Protocol):
    @property
    def rows(self) -> slice | torch.Tensor:
        """Which rows of the step."""
        ...

    def attend(self, query_NxHxD: torch.Tensor, pool: torch.Tensor, window: int | None) -> torch.Tensor: ...


class _OneSession:
    """Rows of one session: a single query, or a chunk of prefill."""

    def __init__(self, arch: ModelConfig, cache: KVCache, rows: SequenceRows, at: int, device: torch.device) -> None:
        self.rows = slice(at, at + rows.count)
        self._arch, self._span_of = arch, rows
        self._first = rows.table.first_slot_if_contiguous
        self._pieces = _long_runs(arch, rows, device)
        pages = -(-rows.end // cache.page_size)
        self._gather = None if self._first is not None else _Gather(torch.tensor(rows.table.pages[:pages], device=device), cache.page_size)
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = {}

    def attend(self, query_NxHxD: torch.Tensor, pool: torch.Tensor, window: int | None) -> torch.Tensor:
        arch, rows = self._arch, self._span_of
        if self._pieces is not None and (window is None or rows.end <= window):
            query = query_NxHxD.view(1, arch.kv_heads, arch.group, arch.head_dim)
            pieces = [(pool[: arch.kv_heads, start:end], pool[arch.kv_heads :, start:end]) for start, end in self._pieces]
            return attend_pieces(arch, query, pieces).reshape(1, arch.heads, arch.head_dim)
        # A decoding row needs no mask for its window: the keys before it are left out.
        begin = max(0, rows.end - window) if window is not None and rows.count == 1 else 0
        key, value = self._keys(pool)[:, begin : rows.end].split(arch.kv_heads)
        mask = self._mask(window, begin, query_NxHxD.dtype, pool.device)
        if rows.count == 1:
            query = query_NxHxD.view(1, arch.kv_heads, arch.group, arch.head_dim)
            return attend(arch, query, key[None], value[None], mask).reshape(1, arch.heads, arch.head_dim)
        causal = mask is None
        out = attend(arch, query_NxHxD.transpose(0, 1)[None], key[None], value[None], mask, causal=causal)
        return out[0].transpose(0, 1)

    def _keys(self, pool: torch.Tensor) -> torch.Tensor:
        if self._gather is None:
            return pool[:, self._first : self._first + self._span_of.end]  # type: ignore[operator]
        return self._gather(pool)

    def _mask(self, window: int | None, begin: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Added to the scores [N, keys from `begin`], or one a head; None where "causal" says it all."""
        key = (window, dtype)
        if key not in self._masks:
            rows, arch = self._span_of, self._arch
            positions = torch.arange(rows.start, rows.end, device=device)
            keys = torch.arange(begin, rows.end, device=device)
            if rows.count == 1 or (rows.start == 0 and (window is None or rows.end <= window) and arch.alibi is None):
                mask = None
            else:
                mask = _hide(_visible(positions, keys, window), dtype)
            if arch.alibi is not None:
                bias_HxL = alibi(arch, keys)
                # For one row, heads are laid out as [K, G]; ALiBi models without grouping have G = 1.
                shaped = bias_HxL.view(arch.kv_heads, arch.group, -1) if rows.count == 1 else bias_HxL[:, None]
                mask = shaped.to(dtype) if mask is None else (shaped + mask).to(dtype)
                mask = mask[None]
            self._masks[key] = mask
        return self._masks[key]


class Gathered:
    """Rows that each attend as one query: one row of each of several sessions, or rows of one session that share its keys.

    Args:
        pages: [B, W] page ids (int64), padded: a session's each, or one session's.
        positions: of the N rows (int64); N = B, or B = 1.
    """

    def __init__(
        self, arch: ModelConfig, page_size: int, rows: slice | torch.Tensor, pages_BxW: torch.Tensor, positions_N: torch.Tensor
    ) -> None:
        self.rows = rows
        self._arch, self._sessions, self._positions = arch, pages_BxW.shape[0], positions_N
        self._gather = _Gather(pages_BxW.flatten(), page_size)
        self._keys = torch.arange(pages_BxW.shape[1] * page_size, device=pages_BxW.device)
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    def attend(self, query_NxHxD: torch.Tensor, pool: torch.Tensor, window: int | None) -> torch.Tensor:
        arch, count = self._arch, query_NxHxD.shape[0]
        kv = self._gather(pool).view(pool.shape[0], self._sessions, -1, pool.shape[2]).transpose(0, 1)
        key, value = kv.expand(count, -1, -1, -1).split(arch.kv_heads, dim=1)
        query = query_NxHxD.reshape(count, arch.kv_heads, arch.group, arch.head_dim)
        out = attend(arch, query, key, value, self._mask(window, query.dtype))
        return out.reshape(count, arch.heads, arch.head_dim)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Added to the scores [N, K, G, keys]."""
        key = (window, dtype)
        if key not in self._masks:
            arch = self._arch
            mask = _hide(_visible(self._positions, self._keys, window), dtype)[:, None, None]
            if arch.alibi is not None:
                mask = (alibi(arch, self._keys).view(1, arch.kv_heads, arch.group, -1) + mask).to(dtype)
            self._masks[key] = mask.expand(-1, -1, arch.group, -1)
        return self._masks[key]


def _groups(arch: ModelConfig, cache: KVCache, rows: Sequence[SequenceRows], device: torch.device) -> list[Group]:
    if len(rows) == 1 and rows[0].count <= FEW_ROWS:
        return [_OneSession(arch, cache, SequenceRows(rows[0].table, rows[0].start + at, 1), at, device) for at in range(rows[0].count)]
    groups: list[Group] = []
    single: list[tuple[int, SequenceRows]] = []
    at = 0
    for r in rows:
        if r.count == 1:
            single.append((at, r))
        else:
            groups.append(_OneSession(arch, cache, r, at, device))
        at += r.count
    # Padding to the longest would make short sessions pay for long ones: split where lengths double.
    single.sort(key=lambda pair: pair[1].end)
    while single:
        limit = 2 * max(single[0][1].end, cache.page_size)
        together = [pair for pair in single if pair[1].end <= limit]
        single = single[len(together) :]
        groups.append(_decode_group(arch, cache, together, device))
    return groups


def _decode_group(arch: ModelConfig, cache: KVCache, together: list[tuple[int, SequenceRows]], device: torch.device) -> Group:
    if len(together) == 1:
        at, alone = together[0]
        return _OneSession(arch, cache, alone, at, device)
    together.sort(key=lambda pair: pair[0])
    places = [at for at, _ in together]
    first, last = places[0], places[-1]
    rows = slice(first, last + 1) if last - first + 1 == len(places) else torch.tensor(places, device=device)
    width = max(-(-r.end // cache.page_size) for _, r in together)
    pages = torch.tensor([_padded(r, width) for _, r in together], device=device)
    return Gathered(arch, cache.page_size, rows, pages, torch.tensor([r.start for _, r in together], device=device))


def _invariant_groups(arch: ModelConfig, cache: KVCache, rows: Sequence[SequenceRows], device: torch.device) -> list[Group]:
    """Every row as one query over keys padded to a multiple of `INVARIANT_KEYS`: the same shapes whatever the batch."""
    assert INVARIANT_KEYS % cache.page_size == 0, "pages must divide the padding of the batch-invariant mode"
    groups: list[Group] = []
    at = 0
    for r in rows:
        width = -(-r.end // INVARIANT_KEYS) * (INVARIANT_KEYS // cache.page_size)
        where = slice(at, at + r.count)
        pages = torch.tensor([_padded(r, width)], device=device)
        groups.append(Gathered(arch, cache.page_size, where, pages, torch.arange(r.start, r.end, device=device)))
        at += r.count
    return groups


def _padded(rows: SequenceRows, width: int) -> list[int]:
    return (rows.table.pages[: -(-rows.end // rows.table.page_size)] + [0] * width)[:width]


def attend(
    arch: ModelConfig,
    query_BxHxNxD: torch.Tensor,
    key_BxKxLxD: torch.Tensor,
    value_BxKxLxD: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    grouped = query_BxHxNxD.shape[1] != key_BxKxLxD.shape[1]
    if arch.attention_softcap is None:
        return F.scaled_dot_product_attention(
            query_BxHxNxD, key_BxKxLxD, value_BxKxLxD, attn_mask=mask, is_causal=causal, scale=arch.scale, enable_gqa=grouped
        )
    if grouped:
        key_BxKxLxD, value_BxKxLxD = (t.repeat_interleave(arch.group, dim=1) for t in (key_BxKxLxD, value_BxKxLxD))
    scores = query_BxHxNxD @ key_BxKxLxD.transpose(-1, -2) * arch.scale
    scores = torch.tanh(scores / arch.attention_softcap) * arch.attention_softcap
    if causal:
        count = scores.shape[-1]
        mask = _hide(torch.ones(count, count, dtype=torch.bool, device=scores.device).tril(), scores.dtype)
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype) @ value_BxKxLxD


def attend_pieces(arch: ModelConfig, query_1xKxGxD: torch.Tensor, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One row's attention [K, G, D] to keys and values [K, L, D] that lie in several places.

    Each piece is cut into chunks, and all are merged by their log-sum-exp (Flash-Decoding, Dao et al., 2023).
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    parts = []
    for key, value in pieces:
        chunks = key.shape[1] // CHUNK_KEYS
        whole = chunks * CHUNK_KEYS
        if chunks:
            keys, values = (t[:, :whole].unflatten(1, (chunks, CHUNK_KEYS)).transpose(0, 1) for t in (key, value))
            parts.append(flash(query_1xKxGxD.expand(chunks, -1, -1, -1), keys, values, scale=arch.scale))
        if whole < key.shape[1]:
            parts.append(flash(query_1xKxGxD, key[None, :, whole:], value[None, :, whole:], scale=arch.scale))
    out, logsumexp = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return (out * torch.softmax(logsumexp, 0)[..., None]).sum(0).to(out.dtype)


def _runs(rows: SequenceRows) -> list[tuple[int, int]]:
    """The slots [start, end) that hold the session's positions, in order, page ids that follow one another taken together."""
    table, size = rows.table, rows.table.page_size
    first = table.first_slot_if_contiguous
    if first is not None:
        return [(first, first + rows.end)]
    pages = table.pages[: -(-rows.end // size)]
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page * size:
            runs[-1] = (runs[-1][0], (page + 1) * size)
        else:
            runs.append((page * size, (page + 1) * size))
    start, end = runs[-1]
    runs[-1] = (start, end - (len(pages) * size - rows.end))
    return runs


def _long_runs(arch: ModelConfig, rows: SequenceRows, device: torch.device) -> list[tuple[int, int]] | None:
    """The runs of a row that is to be attended in pieces, else None."""
    plain = arch.alibi is None and arch.attention_softcap is None and device.type == "cpu"
    if not plain or rows.count != 1 or rows.end < LONG_KEYS:
        return None
    runs = _runs(rows)
    return runs if len(runs) <= MOST_RUNS else None


class _Gather:
    """The rows [2K, W * page_size, D] of pages [W], side by side; the same pages of every block of a step.

    By rows of dimension 0, which torch copies whole: three times as fast as by dimension 1.
    """

    def __init__(self, pages_W: torch.Tensor, page_size: int) -> None:
        self._pages, self._page_size = pages_W, page_size
        self._rows: torch.Tensor | None = None

    def __call__(self, pool_KKxPxD: torch.Tensor) -> torch.Tensor:
        heads, slots, head_dim = pool_KKxPxD.shape
        pages = slots // self._page_size
        if self._rows is None:
            first_of_head = torch.arange(0, heads * pages, pages, device=self._pages.device)
            self._rows = (first_of_head[:, None] + self._pages).flatten()
        return pool_KKxPxD.view(heads * pages, self._page_size * head_dim).index_select(0, self._rows).view(heads, -1, head_dim)


def _visible(positions_N: torch.Tensor, keys_L: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which keys a row sees [N, L]: none after it, and none `window` or more before it."""
    distance = positions_N[:, None] - keys_L
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _hide(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def alibi(arch: ModelConfig, keys_L: torch.Tensor) -> torch.Tensor:
    """ALiBi's bias [H, L] in float32, rounded as the family rounds it."""
    assert arch.alibi is not None, "this architecture has no ALiBi"
    slopes = alibi_slopes(arch.heads, keys_L.device).to(arch.alibi)
    return (slopes[:, None] * keys_L.to(arch.alibi)).float() * arch.alibi_scale


@lru_cache
def alibi_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """ALiBi's slopes [H] in float32: a geometric sequence, filled up from the next power of two's where H is none."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)
