"""What goes into one forward of an engine, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from corolla.engine.attention import SequenceRows
from corolla.models.adapted import Blocks


@dataclass(frozen=True, slots=True, eq=False)
class PromptRows:
    """What a soft prompt does to the first rows of a work, R of them: stands in place of their embeddings, and is added at each block."""

    input: torch.Tensor | None  # [R, hidden]
    deep: torch.Tensor | None  # [blocks, R, hidden]


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledSequence:
    """One session's rows in a step: token ids for a span that embeds, else hidden states [count, hidden]."""

    rows: SequenceRows
    payload: Sequence[int] | torch.Tensor
    logits: int  # so many of the last rows' logits are wanted
    prompt: PromptRows | None = None
    adapter: Blocks | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ForwardOutput:
    """What a step left: hidden states [T, hidden] of all rows, logits [those that are wanted, vocabulary]."""

    hidden: torch.Tensor
    logits: torch.Tensor | None
