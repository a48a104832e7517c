"""Which steps an engine takes in: what can never be computed is refused on the caller's thread, before anything is allocated."""

from __future__ import annotations

import torch

from corolla.engine.sampler import check_vocabulary
from corolla.errors import EmptyPrompt, InvalidSetting, PromptTooLong
from corolla.models.span import SpanModel
from corolla.types import Span, Step


def validated_span(step: Step, model: SpanModel, context_length: int) -> Span:
    """The blocks that the step goes through, which holds `context_length` tokens at most.

    Raises `EmptyPrompt`, `PromptTooLong` and `InvalidSetting` for a step that can never be computed.
    """
    arch, count = model.arch, len(step.payload)
    if count == 0:
        raise EmptyPrompt
    if step.start < 0:
        raise InvalidSetting("start", f"{step.start} is no position")
    if not 0 <= step.drafts < count:
        raise InvalidSetting("drafts", f"{step.drafts} of {count} rows cannot be guesses")
    certain = step.start + count - step.drafts
    if certain > context_length - (step.settings is not None):
        raise PromptTooLong(certain, context_length)
    span, own = step.span or model.span, model.span
    if not own.start <= span.start < span.end <= own.end:
        raise InvalidSetting("blocks", f"{span} are not among the blocks {own} held here")
    if isinstance(step.payload, torch.Tensor):
        if step.payload.shape != (count, arch.hidden):
            raise InvalidSetting("payload", f"hidden states come in the shape [tokens, {arch.hidden}]")
        if span.start == 0 and not step.wants_hidden:
            raise InvalidSetting("payload", "block 0 takes token ids, unless hidden states are wanted back")
    elif span.start == 0:
        outside = next((token for token in step.payload if not 0 <= token < arch.vocabulary), None)
        if outside is not None:
            raise InvalidSetting("payload", f"{outside} is no token of a vocabulary of {arch.vocabulary}")
    else:
        raise InvalidSetting("payload", f"block {span.start} takes hidden states of shape [tokens, {arch.hidden}]")
    if step.settings is not None:
        check_vocabulary(step.settings, arch.vocabulary)
    return span
