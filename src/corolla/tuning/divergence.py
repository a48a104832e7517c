"""When a loss shows that a training has diverged: it is not finite, absurd, or has risen by half of what guessing costs."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from transformers import TrainerCallback

from corolla.errors import TrainingError
from corolla.tuning.evaluation import check_loss

RISEN = 0.5  # times ln(vocabulary), by which the mean of `WINDOW` steps may rise above its lowest
WINDOW = 10


class Divergence(TrainerCallback):
    """Ends a training by `TrainingError` once a step's loss is not finite or absurd, or has risen; before anything of it is saved."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._lowest = math.inf

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss, when = float(logs["loss"]), f"in step {state.global_step}"
        check_loss(loss, self._vocabulary, when, "the last checkpoint is kept; begin again with a lower learning rate")
        self._last.append(loss)
        mean = math.fsum(self._last) / len(self._last)
        if len(self._last) < WINDOW:
            return
        self._lowest = min(self._lowest, mean)
        if mean > self._lowest + RISEN * math.log(self._vocabulary):
            raise TrainingError(
                f"the loss of the last {WINDOW} steps is {mean:.4g} {when}, and was {self._lowest:.4g}: the training diverges, the last "
                "checkpoint is kept; begin again with a lower learning rate"
            )
