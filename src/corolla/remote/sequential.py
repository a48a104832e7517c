"""A range of a model's blocks as one torch module, computed by servers, with gradients.

Legend: S sequences, N rows of one with its padding, T rows of all without, E hidden, B blocks, P soft tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from corolla.errors import InvalidSetting
from corolla.remote.calls import CallPart, RemoteCalls, Trail
from corolla.remote.session import InferenceSession
from corolla.types import Span


class RemoteSequential(nn.Module):
    """The blocks of `span`: called like a module, cut like a list. It has no parameters, and copies nothing when it is cut."""

    def __init__(self, calls: RemoteCalls, span: Span) -> None:
        super().__init__()
        self.calls, self.span = calls, span

    def forward(
        self, hidden_SxNxE: torch.Tensor, prompts: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The hidden states [S, N, E] that leave the last block; zeros at padding.

        Args:
            prompts: [B, P, E], added to the first P rows of every sequence at each block's input.
            attention_mask: [S, N], 0 where there is padding, on either side: it is not sent, and counts no positions.

        Raises:
            InvalidSetting: a shape that does not fit.
            NoRoute, ServerFault, NetworkError, CallerError: as `Calls.forward` raises them.
        """
        if hidden_SxNxE.ndim != 3:
            raise InvalidSetting("hidden", f"hidden states come as [sequences, rows, hidden], not as {list(hidden_SxNxE.shape)}")
        sequences, longest, _ = hidden_SxNxE.shape
        if attention_mask is None:
            kept, lengths = None, (longest,) * sequences
        else:
            if attention_mask.shape != (sequences, longest):
                raise InvalidSetting("attention_mask", f"its shape {list(attention_mask.shape)} is not {[sequences, longest]}")
            kept = attention_mask.to(hidden_SxNxE.device, torch.bool)
            lengths = tuple(kept.sum(1).tolist())
        if min(lengths, default=0) < 1:
            raise InvalidSetting("attention_mask", "a sequence has no rows: give each at least one")
        if prompts is not None and (prompts.ndim != 3 or len(prompts) != len(self) or prompts.shape[2] != hidden_SxNxE.shape[2]):
            raise InvalidSetting("prompts", f"they come as [{len(self)}, tokens, {hidden_SxNxE.shape[2]}], not as {list(prompts.shape)}")
        if prompts is not None and prompts.shape[1] > min(lengths):
            raise InvalidSetting("prompts", f"{prompts.shape[1]} soft tokens are added to sequences of at least {min(lengths)} rows")
        packed_TxE = hidden_SxNxE.flatten(0, 1) if kept is None else hidden_SxNxE[kept]
        out_TxE: torch.Tensor = _Through.apply(packed_TxE, prompts, self.calls, self.span, lengths, torch.is_grad_enabled())
        if kept is None:
            return out_TxE.view_as(hidden_SxNxE)
        return torch.zeros_like(hidden_SxNxE).masked_scatter(kept[:, :, None], out_TxE)

    def inference_session(self, *, max_length: int, prompts: torch.Tensor | None = None) -> InferenceSession:
        """A session through these blocks: see `InferenceSession`."""
        return InferenceSession(self.calls, self.span, max_length=max_length, prompts=prompts)

    def __len__(self) -> int:
        return len(self.span)

    def __iter__(self) -> Iterator[RemoteSequential]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> RemoteSequential:
        """Some of the blocks, or one of them. Raises `IndexError` where there are none, `InvalidSetting` for a stride."""
        blocks = range(self.span.start, self.span.end)[index]
        if isinstance(blocks, int):
            return RemoteSequential(self.calls, Span(blocks, blocks + 1))
        if blocks.step != 1:
            raise InvalidSetting("blocks", "they are cut without a stride")
        if not blocks:
            raise IndexError(f"there are no blocks {index} of {len(self)}")
        return RemoteSequential(self.calls, Span(blocks.start, blocks.stop))

    def extra_repr(self) -> str:
        return f"blocks {self.span}"


class _Through(torch.autograd.Function):
    """Rows [T, E] through remote blocks. What entered each server is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        packed_TxE: torch.Tensor,
        prompts: torch.Tensor | None,
        calls: RemoteCalls,
        span: Span,
        lengths: tuple[int, ...],
        grad: bool,
    ) -> torch.Tensor:
        out, trails = calls.forward(span, lengths, packed_TxE, prompts, keep=grad and any(ctx.needs_input_grad))
        ctx.calls = calls
        ctx.trails = [(trail.lengths, [(part.hop, part.call) for part in trail.parts], trail.quality) for trail in trails]
        ctx.save_for_backward(prompts, *(part.entered for trail in trails for part in trail.parts))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TxE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        prompts, *entered = ctx.saved_tensors
        rows = iter(entered)
        trails = [
            Trail(lengths, tuple(CallPart(hop, next(rows), call) for hop, call in hops), quality) for lengths, hops, quality in ctx.trails
        ]
        hidden, of_prompts = ctx.calls.backward(trails, gradient_TxE, prompts)
        return hidden, of_prompts, None, None, None, None
