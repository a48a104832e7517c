"""Which steps an engine takes in: what can never be computed is refused on the caller's thread, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from corolla.engine.sampler import check_vocabulary
from corolla.errors import EmptyPrompt, InvalidSetting, PromptTooLong
from corolla.models.span import SpanModel
from corolla.types import Span, Step


def validated_span(step: Step, model: SpanModel, context_length: int) -> Span:
    """The blocks that the step goes through, which holds `context_length` tokens at most.

    Raises `EmptyPrompt`, `PromptTooLong` and `InvalidSetting` for a step that can never be computed.
    """
    count = len(step.payload)
    if count == 0:
        raise EmptyPrompt
    if step.start < 0 or step.began_at < 0:
        raise InvalidSetting("start", f"{min(step.start, step.began_at)} is no position")
    if not 0 <= step.drafts < count:
        raise InvalidSetting("drafts", f"{step.drafts} of {count} rows cannot be guesses")
    certain = step.start + count - step.drafts
    if certain > context_length - (step.settings is not None):
        raise PromptTooLong(certain, context_length)
    span, own = step.span or model.span, model.span
    if not own.start <= span.start < span.end <= own.end:
        raise InvalidSetting("blocks", f"{span} are not among the blocks {own} held here")
    if isinstance(step.payload, torch.Tensor):
        _check_hidden(step, step.payload, span, model)
    elif span.start == 0:
        _check_tokens("payload", step.payload, model.arch.vocabulary)
    else:
        raise InvalidSetting("payload", f"block {span.start} takes hidden states of shape [tokens, {model.arch.hidden}]")
    if step.settings is not None:
        check_vocabulary(step.settings, model.arch.vocabulary)
    return span


def _check_hidden(step: Step, rows: torch.Tensor, span: Span, model: SpanModel) -> None:
    """Hidden states may come with their token ids, and must where a token is sampled or scored by them."""
    count, hidden = len(rows), model.arch.hidden
    if rows.shape != (count, hidden) or not rows.is_floating_point():
        raise InvalidSetting("payload", f"hidden states come as floating-point numbers in the shape [tokens, {hidden}]")
    if span.start == 0 and not step.wants_hidden:
        raise InvalidSetting("payload", "block 0 takes token ids, unless hidden states are wanted back")
    if len(step.tokens) not in (0, count):
        raise InvalidSetting("tokens", f"{len(step.tokens)} token ids come with {count} rows")
    settings = step.settings
    needed = step.drafts or (settings is not None and (settings.repetition_penalty != 1 or settings.prompt_logprobs))
    if needed and not step.wants_hidden and not step.tokens:
        raise InvalidSetting("tokens", "guesses, scores and a repetition penalty need the ids of the rows")
    _check_tokens("tokens", step.tokens, model.arch.vocabulary)


def _check_tokens(name: str, tokens: Sequence[int], vocabulary: int) -> None:
    outside = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise InvalidSetting(name, f"{outside} is no token of a vocabulary of {vocabulary}")
