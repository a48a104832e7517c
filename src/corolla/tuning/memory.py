"""How much memory a fine-tuning takes, told before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from corolla.errors import TrainingError
from corolla.models.config import ModelConfig

_BASE = 0.5e9  # the process with its libraries, in bytes
_MARGIN = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What is trained, and how: `trained` and `frozen` count parameters, `sequences` of `length` tokens are computed at a time.

    `bytes` estimates the memory of one device. Weights that are trained, their gradients and the two moments of Adam (three with
    AMSGrad) are float32; what is frozen has `frozen_bytes` each. A block keeps 34 hidden rows of 2 bytes for its backward, and
    attention that holds its scores 5 for each head and pair of tokens (Korthikanti et al., 2022, table 2); with checkpointing
    only its input, and one block is computed anew at a time. The head's logits are held as computed, in float32 and with their gradient.
    """

    arch: ModelConfig
    trained: int
    frozen: int
    frozen_bytes: int
    amsgrad: bool
    sequences: int
    length: int
    checkpointing: bool
    wide: bool = False  # computed in float32
    scores: bool = False  # whether attention holds its scores

    @property
    def bytes(self) -> int:
        states = self.trained * (20 if self.amsgrad else 16) + self.frozen * self.frozen_bytes
        rows = self.sequences * self.length
        wide = 2 if self.wide else 1
        block = rows * self.arch.hidden * 34 * wide
        if self.scores:
            block += 5 * self.arch.heads * self.sequences * self.length**2 * wide
        kept = rows * self.arch.hidden * 2 * wide * self.arch.blocks + block if self.checkpointing else block * self.arch.blocks
        logits = rows * self.arch.vocabulary * (2 * wide + 4 + 4)
        return int(_MARGIN * (states + kept + logits) + _BASE)


def available(device: torch.device) -> int:
    """Bytes that a program may take now on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_fits(need: Need, room: int, *, lora: bool) -> None:
    """Raises `TrainingError` where `need` is more than `room` bytes, saying what would fit."""
    if need.bytes <= room:
        return
    kind: dict[str, Any] = {}
    candidates: list[tuple[dict[str, Any], str]] = [({"checkpointing": True}, "--gradient-checkpointing")]
    sequences = need.sequences // 2
    while sequences:
        candidates += [({"sequences": sequences}, f"--micro-batch {sequences}")]
        candidates += [({"sequences": sequences, "checkpointing": True}, f"--micro-batch {sequences} --gradient-checkpointing")]
        sequences //= 2
    if not lora:
        few = need.arch.blocks * need.arch.hidden * 128  # rank 16 in four matrices a block
        smaller = {"trained": few, "frozen": need.trained + need.frozen, "frozen_bytes": 4 if need.wide else 2}
        kind = {**smaller, "sequences": 1, "checkpointing": True}
        candidates += [(smaller, "--lora"), (kind, "--lora --micro-batch 1 --gradient-checkpointing")]
    for change, said in candidates:
        other = replace(need, **change)
        if other.bytes <= room:
            raise TrainingError(f"{_said(need, room)}; this would fit: {said} (about {_gigabytes(other.bytes)})")
    least = replace(need, **{"sequences": 1, "checkpointing": True, **kind})
    raise TrainingError(
        f"{_said(need, room)}, and {_gigabytes(least.bytes)} at the least: take a smaller model, shorter sequences or a larger machine"
    )


def _said(need: Need, room: int) -> str:
    return f"training would take about {_gigabytes(need.bytes)} of memory and there are {_gigabytes(room)} free"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
