"""Calls without a session: the rows of whole sequences through blocks, and gradients back. Nothing is kept here: see `kept`.

They are generators that return their result: each `next` computes one block for some sequences, so that an engine's loop
can decode for others in between. Of a backward the inputs of all blocks are kept and each block is computed again for its
gradient (checkpointing, Chen et al., 2016), so that memory does not grow with what the blocks compute inside.

Legend: T rows of all sequences, N rows of one, S sequences of one length, E hidden, B blocks, P soft tokens, H heads, K key
heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby

import torch

from corolla.engine.attention import alibi, attend
from corolla.models.block import Block, Rotation, rotations
from corolla.models.config import ModelConfig
from corolla.models.span import SpanModel
from corolla.types import Span

TURN_ROWS = 256  # rows of one `next`, in whole sequences: a longer one goes alone


@dataclass(frozen=True, slots=True, eq=False)
class CallSequences:
    """What goes into a call; on any device, in any floating dtype.

    Args:
        span: the blocks to compute, of those that the model holds.
        lengths: the rows of each sequence, at least 1; they lie one behind another and each attends to itself only.
        hidden: the rows [T, E] that enter the first block.
        prompts: soft tokens [B, P, E], added to the first P rows of every sequence at each block's input; P is at most
            the shortest length.
    """

    span: Span
    lengths: tuple[int, ...]
    hidden: torch.Tensor
    prompts: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """With respect to the rows [T, E], in the model's dtype, and to the prompts [B, P, E], in float32 and summed over sequences."""

    hidden: torch.Tensor
    prompts: torch.Tensor | None


def forward(model: SpanModel, sequences: CallSequences) -> Generator[None, None, torch.Tensor]:
    """Returns the rows [T, E] that leave the last block, in the model's dtype."""
    pieces, prompts = pieces_of(model, sequences.lengths), AddedPrompts(model, sequences)
    hidden = sequences.hidden.to(model.device, model.dtype)
    for index, block in enumerate(model.blocks_of(sequences.span)):
        hidden = yield from through(block, prompts.added(hidden, index), pieces)
    return hidden


def backward(model: SpanModel, sequences: CallSequences, gradient_TxE: torch.Tensor) -> Generator[None, None, Gradients]:
    """Returns the gradients of what has the `gradient` [T, E] with respect to the rows that leave the last block."""
    pieces, prompts = pieces_of(model, sequences.lengths), AddedPrompts(model, sequences)
    blocks = model.blocks_of(sequences.span)
    inputs = [prompts.added(sequences.hidden.to(model.device, model.dtype), 0)]
    for index, block in enumerate(blocks[:-1]):
        hidden = yield from through(block, inputs[-1], pieces)
        inputs.append(prompts.added(hidden, index + 1))
    gradient = gradient_TxE.to(model.device, model.dtype)
    of_prompts = []
    for block in reversed(blocks):
        gradient = yield from _back(block, inputs.pop(), gradient, pieces)
        of_prompts.append(prompts.summed(gradient))
    return Gradients(gradient, torch.stack(of_prompts[::-1]) if sequences.prompts is not None else None)


class SequenceAttention:
    """`models.block.Attention` without a cache: sequences of these lengths, each from position 0; those of equal length that
    follow one another are attended in one."""

    def __init__(self, arch: ModelConfig, lengths: tuple[int, ...]) -> None:
        self._arch = arch
        self._runs = [(length, length * len(list(same))) for length, same in groupby(lengths)]
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def __call__(self, block: int, qkv_TxHKKxD: torch.Tensor) -> torch.Tensor:
        window = self._arch.window[block]
        parts = qkv_TxHKKxD.split([rows for _, rows in self._runs])
        attended = [self._attend(part, length, window) for part, (length, _) in zip(parts, self._runs, strict=True)]
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def _attend(self, qkv: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
        arch = self._arch
        key = (length, window)
        if key not in self._masks:
            self._masks[key] = _mask(arch, length, window, qkv.dtype, qkv.device)
        mask = self._masks[key]
        qkv_SxHKKxNxD = qkv.view(-1, length, arch.qkv_heads, arch.head_dim).transpose(1, 2)
        query, keys, values = qkv_SxHKKxNxD.split([arch.heads, arch.kv_heads, arch.kv_heads], dim=1)
        out = attend(arch, query, keys, values, mask, causal=mask is None)
        return out.transpose(1, 2).reshape(-1, arch.heads * arch.head_dim)


def _mask(arch: ModelConfig, length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Added to the scores [N, N], or one a head; None where "causal" says it all."""
    if arch.alibi is None and (window is None or length <= window):
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    hidden = (distance < 0) | (distance >= (window or length))
    mask = torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return mask if arch.alibi is None else (alibi(arch, positions)[:, None] + mask).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class RowChunk:
    """Some of the sequences, which go through a block together."""

    rows: slice
    attention: SequenceAttention
    turns: tuple[Rotation, ...]


def pieces_of(model: SpanModel, lengths: tuple[int, ...]) -> list[RowChunk]:
    together: list[list[int]] = [[]]
    for length in lengths:
        if together[-1] and sum(together[-1]) + length > TURN_ROWS:
            together.append([])
        together[-1].append(length)
    alike: dict[tuple[int, ...], tuple[SequenceAttention, tuple[Rotation, ...]]] = {}
    pieces, at = [], 0
    for key in map(tuple, together):
        if key not in alike:
            positions = torch.cat([torch.arange(length, device=model.device) for length in key])
            alike[key] = SequenceAttention(model.arch, key), rotations(model.arch, positions, model.dtype)
        pieces.append(RowChunk(slice(at, at + sum(key)), *alike[key]))
        at += sum(key)
    return pieces


class AddedPrompts:
    """The soft tokens of a call, and the rows that they are added to."""

    def __init__(self, model: SpanModel, sequences: CallSequences) -> None:
        self._count = len(sequences.lengths)
        self._prompts_BxPxE = None if sequences.prompts is None else sequences.prompts.to(model.device, model.dtype)
        width = 0 if sequences.prompts is None else sequences.prompts.shape[1]
        lengths = torch.tensor(sequences.lengths, device=model.device)
        starts = lengths.cumsum(0) - lengths
        self._rows = (starts[:, None] + torch.arange(width, device=model.device)).flatten()

    def added(self, hidden_TxE: torch.Tensor, block: int) -> torch.Tensor:
        """What enters the part's block of that index."""
        if self._prompts_BxPxE is None:
            return hidden_TxE
        return hidden_TxE.index_add(0, self._rows, self._prompts_BxPxE[block].repeat(self._count, 1))

    def summed(self, gradient_TxE: torch.Tensor) -> torch.Tensor:
        """A block's share of the gradient with respect to the prompts [P, E], from the one with respect to its input."""
        return gradient_TxE[self._rows].float().view(self._count, -1, gradient_TxE.shape[1]).sum(0)


# No yield lies within a `with`: the loop would go on in that mode.


def through(block: Block, hidden_TxE: torch.Tensor, pieces: list[RowChunk]) -> Generator[None, None, torch.Tensor]:
    out = torch.empty_like(hidden_TxE)
    for piece in pieces:
        with torch.no_grad():
            out[piece.rows] = block(hidden_TxE[piece.rows], piece.attention, piece.turns)
        yield
    return out


def _back(
    block: Block, hidden_TxE: torch.Tensor, gradient_TxE: torch.Tensor, pieces: list[RowChunk]
) -> Generator[None, None, torch.Tensor]:
    out = torch.empty_like(gradient_TxE)
    differentiable = block.differentiable()
    for piece in pieces:
        with torch.enable_grad():
            entered = hidden_TxE[piece.rows].detach().requires_grad_()
            left = differentiable(entered, piece.attention, piece.turns)
            (out[piece.rows],) = torch.autograd.grad(left, entered, gradient_TxE[piece.rows])
        yield
    return out
