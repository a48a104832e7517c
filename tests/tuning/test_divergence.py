"""Trainings that diverge, and models that are not read as they were made, end by an error that says so."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from corolla.errors import TrainingError
from corolla.tuning.checkpoints import last_checkpoint
from corolla.tuning.divergence import Divergence
from corolla.tuning.evaluation import check_loss
from corolla.tuning.run_record import read_record
from tests.tuning.conftest import Tune


class Leap(TrainerCallback):
    """Makes the head's logits so many times larger before a step, so that its loss is absurd."""

    def __init__(self, step: int, scale: float) -> None:
        self.step, self.scale = step, scale

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.model.lm_head.weight.mul_(self.scale)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1044.0, 3.01 * math.log(400)])
def test_a_loss_that_no_language_model_has_is_refused(loss: float) -> None:
    with pytest.raises(TrainingError, match=r"before training.*: fetch the model again"):
        check_loss(loss, 400, "before training", "fetch the model again")


def test_the_loss_of_a_model_that_knows_nothing_is_none_of_them() -> None:
    check_loss(math.log(400) + 2, 400, "before training", "")


def logged(watch: Divergence, losses: list[float]) -> None:
    for step, loss in enumerate(losses):
        watch.on_log(None, SimpleNamespace(global_step=step), None, {"loss": loss})


def test_a_loss_that_rises_and_stays_is_a_divergence_and_one_bad_step_is_none() -> None:
    falling = [6 - 0.1 * step for step in range(40)]
    logged(Divergence(50_000), [*falling, 12.0, *[2.0] * 20])
    with pytest.raises(TrainingError, match="the training diverges"):
        logged(Divergence(50_000), [*falling, *[9.0] * 20])


def test_a_tuning_that_leaps_away_ends_and_keeps_its_last_checkpoint(tuning: Tune, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nats a token in step 5, where guessing gives 5\.99"):
        tuning("prompt", "llama", Leap(5, 1e3), save_every=2)
    record = read_record(tmp_path / "prompt")
    assert record is not None
    assert record.status == "failed"
    checkpoint = last_checkpoint(tmp_path / "prompt")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"


def test_a_model_with_damaged_weights_is_not_tuned(models: dict[str, Path], tuning: Tune, tmp_path: Path) -> None:
    weights = models["llama"] / "model.safetensors"
    before, tensors = weights.read_bytes(), load_file(weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1e3
    save_file(tensors, weights, {"format": "pt"})
    try:
        with pytest.raises(TrainingError, match="before training"):
            tuning()
    finally:
        weights.write_bytes(before)
    assert not (tmp_path / "prompt" / "adapter_model.safetensors").exists()
