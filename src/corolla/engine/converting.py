"""What clients sent of prompts and adapters, as it is computed with."""

from __future__ import annotations

from collections.abc import Callable

import torch

Convert = Callable[[torch.Tensor, torch.device, torch.dtype], torch.Tensor]


def converted(values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Called on the engine's thread: see `threads`."""
    return values.to(device, dtype)
