"""The loss of tokens under a model with a soft prompt, without ever holding the logits of a whole batch.

Legend: S sequences, N columns, E hidden, T trained tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from corolla.data.tokens import IGNORED
from corolla.models.families import architecture
from corolla.remote.modeling import Distributed

_VALUES = 2**21  # of logits at a time, 8 MB in float32
_LEAST_ROWS = 32  # whatever the vocabulary: a product of fewer reads the head's weights too often


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
    arch = architecture(model.config)
    softcap = arch.logits_softcap

    def logits(rows_TxE: torch.Tensor) -> torch.Tensor:
        logits_TxV: torch.Tensor = head(rows_TxE).float()
        return logits_TxV if softcap is None else torch.tanh(logits_TxV / softcap) * softcap

    at_once = max(_LEAST_ROWS, _VALUES // arch.vocabulary)
    return summed_cross_entropy(predicting[trained], predicted[trained], logits, at_once), int(trained.sum())


def summed_cross_entropy(
    rows_TxE: torch.Tensor, labels_T: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor], at_once: int
) -> torch.Tensor:
    """The summed cross entropy of rows, of which `logits` makes float32 [rows, V]: of `at_once` rows at a time. A float32 scalar.

    Only the rows get a gradient. It is computed in the forward, while a piece's logits are there, and in their place: as in Liger's
    fused linear cross entropy (Hsu et al., 2024), so that neither logits [T, V] nor a second product are needed. The function
    `logits` must not need its result for its own gradient.
    """
    loss: torch.Tensor = _CrossEntropy.apply(rows_TxE, labels_T, logits, at_once)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """See `summed_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, rows_TxE: torch.Tensor, labels_T: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor], at_once: int
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=rows_TxE.device)
        # Made first: small tensors that stay, between large ones that come and go, would keep the allocator from using its room again.
        gradient_TxE = torch.zeros_like(rows_TxE)
        pieces = (each.split(at_once) for each in (rows_TxE.detach(), labels_T, gradient_TxE))
        for rows, labels, gradient in zip(*pieces, strict=True):
            with torch.set_grad_enabled(wanted):
                piece = rows.requires_grad_(wanted)
                made = logits(piece)
            total += _in_place(made.detach(), labels, wanted=wanted)
            if wanted:
                gradient.copy_(torch.autograd.grad(made, piece, made.detach())[0])
            del made  # before the next piece's are made beside them
        ctx.save_for_backward(gradient_TxE)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (of_rows,) = ctx.saved_tensors
        return of_rows * gradient, None, None, None


def _in_place(logits_RxV: torch.Tensor, labels_R: torch.Tensor, *, wanted: bool) -> torch.Tensor:
    """The summed cross entropy, a scalar. Where it is wanted, its gradient takes the logits' place: softmax less the labels' ones."""
    labels_Rx1 = labels_R[:, None]
    logits_RxV.sub_(logits_RxV.amax(1, keepdim=True))
    of_labels_Rx1 = logits_RxV.gather(1, labels_Rx1)
    sums_Rx1 = logits_RxV.exp_().sum(1, keepdim=True)
    if wanted:
        logits_RxV.div_(sums_Rx1).scatter_add_(1, labels_Rx1, torch.full_like(sums_Rx1, -1.0))
    return (sums_Rx1.log() - of_labels_Rx1).sum()
