"""A call as it travels, all rows in one tensor, and its answer: for servers, and for the model in the client's own process.

Legend: T rows of all sequences, E hidden, B blocks, P soft tokens.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from corolla.engine import activations, calls
from corolla.engine.activations import ActivationLimits, ActivationStore
from corolla.engine.calls import CallSequences, Gradients
from corolla.engine.prompts import PromptStore
from corolla.errors import ActivationsGone, InvalidSetting, PromptNeeded
from corolla.models.span import SpanModel
from corolla.types import Call


@dataclass(slots=True)
class CallCounters:
    """What happened since the start."""

    forwards: int = 0
    backwards: int = 0
    backwards_from_kept: int = 0  # of these: without a second forward
    activations_gone: int = 0  # backwards that came too late for what was kept, or whose forward was too large to keep


class CallHandler:
    """Computes calls with what one server keeps for its clients. Calls are computed on one thread, the rest is for any."""

    def __init__(self, model: SpanModel, prompts: PromptStore, limits: ActivationLimits | None = None) -> None:
        self._model, self._prompts = model, prompts
        self.kept = ActivationStore(limits)
        self.counters = CallCounters()

    def answer(self, call: Call, came: torch.Tensor) -> Generator[None, None, torch.Tensor]:
        """Returns the rows that leave, or the gradients of the rows, then, in float32, of the prompts, block by block.

        Raises:
            InvalidSetting: rows that are not finite, or a result that overflows: another server would find the same.
            PromptNeeded, ActivationsGone: the client has to send more.
        """
        if not bool(came.isfinite().all()):
            raise InvalidSetting("hidden", "some of the values that came with the call are NaN or infinite")
        if call.back:
            gradients = yield from self._backward(call, came)
            result = gradients.hidden
            if gradients.prompts is not None:
                result = torch.cat([result.float(), gradients.prompts.flatten(0, 1)])
        else:
            result = yield from self._forward(call, came)
        if not bool(result.isfinite().all()):
            dtype = str(self._model.dtype).removeprefix("torch.")
            raise InvalidSetting("hidden", f"the result overflows this server's {dtype}: send smaller values or gradients")
        return result

    def _forward(self, call: Call, came: torch.Tensor) -> Generator[None, None, torch.Tensor]:
        sequences = self._sequences(call, came)
        self.counters.forwards += 1
        if not call.keep:
            return (yield from calls.forward(self._model, sequences))
        out, saved = yield from activations.forward(self._model, sequences, self.kept, call.client)
        if saved is not None:
            self.kept.put(call.client, call.number, saved)
        return out

    def _backward(self, call: Call, came: torch.Tensor) -> Generator[None, None, Gradients]:
        if not call.kept:
            self.counters.backwards += 1
            return (yield from calls.backward(self._model, self._sequences(call, came), came[sum(call.lengths) :][: sum(call.lengths)]))
        try:
            saved = self.kept.take(call.client, call.kept)
            if saved.lengths != call.lengths or len(saved.blocks) != len(call.span):
                raise ActivationsGone  # of another call than the client thinks
        except ActivationsGone:
            self.counters.activations_gone += 1
            raise
        self.counters.backwards += 1
        self.counters.backwards_from_kept += 1
        return (yield from activations.backward(self._model, saved, self.kept, came))

    def _sequences(self, call: Call, came: torch.Tensor) -> CallSequences:
        prompts = None
        if call.prompt is not None:
            part = self._prompts.find(call.client, call.prompt, call.span, with_input=False)
            if part is None:
                raise PromptNeeded
            prompts = part.deep
        return CallSequences(call.span, call.lengths, came[: sum(call.lengths)], prompts)
