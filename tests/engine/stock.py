"""Stock transformers' blocks with autograd: what calls are tested against."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

from corolla.engine.calls import CallSequences, Gradients

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class StockBlocks:
    """The blocks of a whole stock model, entered and left at any of them."""

    def __init__(self, directory: Path, dtype: str = "float32") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], local_files_only=True).eval()
        self.model.requires_grad_(False)
        base = self.model.base_model
        self.layers = base.layers if hasattr(base, "layers") else base.h

    def run(self, sequences: CallSequences) -> torch.Tensor:
        """Rows [T, E] that leave the last block; one sequence after another, differentiable."""
        return torch.cat([self._one(sequences, rows) for rows in sequences.hidden.split(sequences.lengths)])

    def gradients(self, sequences: CallSequences, gradient: torch.Tensor) -> Gradients:
        hidden = sequences.hidden.clone().requires_grad_()
        prompts = None if sequences.prompts is None else sequences.prompts.clone().requires_grad_()
        left = self.run(CallSequences(sequences.span, sequences.lengths, hidden, prompts))
        of = torch.autograd.grad(left, [hidden] if prompts is None else [hidden, prompts], gradient)
        return Gradients(of[0], of[1] if prompts is not None else None)

    def _one(self, sequences: CallSequences, rows: torch.Tensor) -> torch.Tensor:
        span, prompts, left = sequences.span, sequences.prompts, []

        def enter(index: int) -> Callable[..., Any]:
            def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                hidden = rows[None] if index == span.start else args[0]
                if prompts is not None:
                    added = torch.nn.functional.pad(prompts[index - span.start], (0, 0, 0, rows.shape[0] - prompts.shape[1]))
                    hidden = hidden + added
                return (hidden, *args[1:])

            return hook

        hooks = [self.layers[index].register_forward_pre_hook(enter(index)) for index in range(span.start, span.end)]
        hooks.append(
            self.layers[span.end - 1].register_forward_hook(lambda m, a, out: left.append(out[0] if isinstance(out, tuple) else out))
        )
        try:
            self.model(torch.zeros(1, rows.shape[0], dtype=torch.long), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return left[0].reshape(rows.shape)


def example(
    span: Any, lengths: Sequence[int], hidden: int, prompts: int = 0, *, dtype: str = "float32"
) -> tuple[CallSequences, torch.Tensor]:
    """Random rows, prompts and gradients."""
    generator = torch.Generator().manual_seed(3)
    rows, gradient = (torch.randn(sum(lengths), hidden, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    soft = torch.randn(len(span), prompts, hidden, generator=generator).to(DTYPES[dtype]) if prompts else None
    return CallSequences(span, tuple(lengths), rows, soft), gradient


def finish(call: Generator[None, None, T]) -> T:
    """What a call returns."""
    while True:
        try:
            next(call)
        except StopIteration as done:
            return done.value
