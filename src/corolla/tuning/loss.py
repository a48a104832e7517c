"""The loss of tokens under a model with a soft prompt, without ever holding the logits of a whole batch.

Legend: S sequences, N columns, E hidden, T trained tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from corolla.data.tokens import IGNORED
from corolla.models.families import architecture
from corolla.remote.base import Distributed

_ROWS = 512  # of logits at a time: 64 MB in float32 where the vocabulary has 32,000 tokens


def summed_loss(
    model: Distributed, input_ids_SxN: torch.Tensor, attention_mask_SxN: torch.Tensor, labels_SxN: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """The summed cross entropy of all labels that are not `IGNORED`, in nats, and how many they are.

    As with PEFT, the last row of the model's prompt predicts the first token; without a prompt nothing does, and its label does not
    count. Raises what `RemoteSequential.forward` raises.
    """
    prompts, head = model.bare.prompts, model.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    left = model.bare(input_ids_SxN, attention_mask_SxN, soft_outputs=True).last_hidden_state
    if prompts is None:
        predicting, predicted = left[:, :-1], labels_SxN[:, 1:]
    else:
        predicting, predicted = left[:, len(prompts) - 1 : -1], labels_SxN
    trained = predicted != IGNORED
    softcap = architecture(model.config).logits_softcap

    def logits(rows_TxE: torch.Tensor) -> torch.Tensor:
        logits_TxV: torch.Tensor = head(rows_TxE).float()
        return logits_TxV if softcap is None else torch.tanh(logits_TxV / softcap) * softcap

    loss: torch.Tensor = _CrossEntropy.apply(predicting[trained], predicted[trained], logits)
    return loss, int(trained.sum())


class _CrossEntropy(torch.autograd.Function):
    """Summed cross entropy of rows [T, E] through a frozen head, some rows at a time.

    The gradient is computed in the forward, while a piece's logits are there: as the fused linear cross entropy of Liger
    (Hsu et al., 2024), so that neither logits [T, V] nor a second product are needed.
    """

    @staticmethod
    def forward(ctx: Any, rows_TxE: torch.Tensor, labels_T: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=rows_TxE.device)
        gradients = []
        for rows, labels in zip(rows_TxE.detach().split(_ROWS), labels_T.split(_ROWS), strict=True):
            with torch.set_grad_enabled(wanted):
                piece = rows.requires_grad_(wanted)
                loss = functional.cross_entropy(logits(piece), labels, reduction="sum")
            if wanted:
                gradients += torch.autograd.grad(loss, piece)
            total += loss.detach()
        ctx.save_for_backward(torch.cat(gradients) if gradients else rows_TxE.new_zeros(rows_TxE.shape))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (of_rows,) = ctx.saved_tensors
        return of_rows * gradient, None, None
