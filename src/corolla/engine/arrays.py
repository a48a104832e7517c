"""Values that clients sent, looked through on the thread that received them.

By NumPy, which computes on the calling thread alone, where torch would give that thread a team of its own: see `threads`.
"""

from __future__ import annotations

import numpy as np
import torch


def stays_finite(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all of `values` (of any floating dtype) are finite, and are so in `dtype` too."""
    array = _array(values.detach().cpu())
    with np.errstate(invalid="ignore"):
        return bool((np.abs(array) <= min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)).all())  # NaN is not


def _array(values: torch.Tensor) -> np.ndarray:
    if values.dtype == torch.bfloat16:  # which NumPy lacks: the upper half of a float32
        return (values.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    array = values.numpy()
    return array.astype(np.float32) if values.dtype == torch.float16 else array
