"""The loss in pieces is torch's in one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from corolla.data.tokens import IGNORED
from corolla.tuning.logits_loss import trained_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize(("vocabulary", "trained"), [(5, 1.0), (70_000, 0.4), (70_000, 0.0)])
def test_value_and_gradient(smoothing: float, vocabulary: int, trained: float) -> None:
    """A large vocabulary, so that there are several pieces."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (3, 20), generator=generator)
    labels[torch.rand(3, 20, generator=generator) >= trained] = IGNORED
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = trained_loss(ours, labels, smoothing=smoothing, divisor=7)
    expected = functional.cross_entropy(
        theirs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing, ignore_index=IGNORED
    )
    torch.testing.assert_close(loss, expected / 7)
    (2 * loss).backward()
    (2 * expected / 7).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
