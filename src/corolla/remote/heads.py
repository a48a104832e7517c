"""Models with a head, whose blocks are elsewhere: classifiers, and language models with `generate(session=...)`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin

from corolla.errors import InvalidSetting
from corolla.models.linear import Linear, make_linear
from corolla.remote.bare import DistributedModel
from corolla.remote.base import Distributed, distributed
from corolla.remote.cache import RemoteCache
from corolla.remote.session import InferenceSession

_FEW_ROWS = 64  # of hidden states; for more of them the stock product is as quick
_MOST_COPIED = 2**30  # bytes of a head; of a larger one no second copy is kept


class Head(nn.Linear):
    """A language model's head. Without gradients, on a CPU and for a few rows, its product is the one that servers compute: over a copy
    of the weight that is packed when it is first needed, of half the size or the same (SmolLM2 in float32, a row: 4 ms in place of 9)."""

    _packed: Linear | None = None
    _packed_of: tuple[int, int] | None = None  # the weight's address and version

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [..., vocabulary] of hidden states [..., hidden]."""
        rows = hidden.numel() // hidden.shape[-1]
        weight = self.weight
        if torch.is_grad_enabled() or weight.device.type != "cpu" or not 0 < rows <= _FEW_ROWS or weight.nbytes > _MOST_COPIED:
            return super().forward(hidden)
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self._packed is None or self._packed_of != state:
            self._packed, self._packed_of = make_linear(weight.detach(), self.bias, "packed"), state
        return self._packed(hidden.reshape(rows, -1).contiguous()).view(*hidden.shape[:-1], -1)


class _WithHead(Distributed):
    """Mixed into transformers' class of a family with some head."""

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            super().__init__(config)
            setattr(self, self.base_model_prefix, distributed(DistributedModel, type(self.base_model))(config))
        self.tie_weights()


class DistributedForSequenceClassification(_WithHead):
    """A classifier whose blocks are computed by servers, with a head, `score`, which is trained."""

    made_here = ("score.weight",)


class DistributedForCausalLM(_WithHead, GenerationMixin):
    """A language model whose blocks are computed by servers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stock = cast(nn.Linear, self.lm_head)
        self.lm_head = Head(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        self.tie_weights()

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`, with all that it offers; the servers keep the caches.

        With a `session` of this model the answer goes on from what was put in and got out there before: give the new tokens
        only, and get them and the answer back.
        """
        if session is not None:
            return self._go_on(session, inputs, args, kwargs)
        if kwargs.get("use_cache") is False or kwargs.get("past_key_values") is not None:
            return self._stock_generate(inputs, *args, **kwargs)
        with self.inference_session() as own:
            return self._stock_generate(inputs, *args, past_key_values=RemoteCache(own), **kwargs)

    def _stock_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # annotated for a class of transformers' own

    def _go_on(self, session: InferenceSession, inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = kwargs.pop("input_ids", None) if inputs is None else inputs
        before, whole = session.output_ids, new
        if before is not None:
            if new is not None and len(new) != len(before):
                raise InvalidSetting("inputs", f"{len(new)} sequences do not go on from the session's {len(before)}")
            whole = before if new is None else torch.cat([before, new.to(before)], 1)
            kwargs["attention_mask"] = _whole_mask(session, whole, new, kwargs.get("attention_mask"))
        began, count, answered = session.position, session.sequences, False
        try:
            result = self._stock_generate(whole, *args, past_key_values=RemoteCache(session), **kwargs)
            answered = True
        finally:
            if not answered:
                _undo(session, began, count)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        settings = kwargs.get("generation_config") or self.generation_config
        if (kwargs.get("num_beams") or settings.num_beams or 1) > 1:
            _leave_beams(session, len(sequences), 1 if whole is None else len(whole), 1 if whole is None else whole.shape[1])
        session.output_ids = sequences
        new = sequences if before is None else sequences[:, before.shape[1] :]
        if isinstance(result, torch.Tensor):
            return new
        result.sequences = new
        return result


def _whole_mask(session: InferenceSession, whole: torch.Tensor, new: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor:
    """Of all tokens [S, N]: padding of earlier turns stays padding. `given` is that of the new tokens, or ends with it."""
    mask = torch.ones(whole.shape, dtype=whole.dtype, device=whole.device)
    known = session.attention_mask[:, session.prefix :]
    mask[:, : known.shape[1]] = known.to(mask)
    if new is not None and given is not None and new.shape[1]:
        mask[:, -new.shape[1] :] = given[:, -new.shape[1] :].to(mask)
    return mask


def _leave_beams(session: InferenceSession, answers: int, inputs: int, columns: int) -> None:
    """Which beams won is not known here: go back to what all beams of an input have in common, one sequence for each answer."""
    beams, each = session.sequences // inputs, answers // inputs
    session.reorder([index * beams for index in range(inputs) for _ in range(each)])
    session.position = session.prefix + columns


def _undo(session: InferenceSession, position: int, sequences: int) -> None:
    """Go back to where the turn began."""
    if position and session.sequences > sequences:
        beams = session.sequences // sequences
        session.reorder([index * beams for index in range(sequences)])
    said = session.output_ids
    session.position = position
    session.output_ids = said
