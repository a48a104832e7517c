"""What would not fit is refused, with what would."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tuning.finetuning import make_directory

from corolla.errors import TrainingError
from corolla.models.checkpoint import Checkpoint
from corolla.models.families import architecture
from corolla.tuning.memory import Need, available, check_fits


@pytest.fixture
def need(tmp_path: Path) -> Need:
    with Checkpoint(make_directory(tmp_path)) as checkpoint:
        arch = dataclasses.replace(architecture(checkpoint.config), blocks=24, hidden=1024, heads=16, vocabulary=250_880)
    return Need(
        arch=arch, trained=559_000_000, frozen=0, frozen_bytes=2, amsgrad=True, sequences=16, length=1500, checkpointing=False, scores=True
    )


def test_the_560m_with_sft_chat(need: Need) -> None:
    """Weights, gradients and three moments alone are 11.2 GB, and the logits of 16 x 1,500 tokens 60 GB."""
    assert 70e9 < need.bytes < 400e9
    assert dataclasses.replace(need, checkpointing=True).bytes < need.bytes
    assert dataclasses.replace(need, sequences=1, checkpointing=True).bytes < 20e9


@pytest.mark.parametrize(
    ("room", "said"),
    [(500e9, None), (100e9, "--gradient-checkpointing"), (20e9, "--micro-batch"), (8.5e9, "--lora"), (1e9, "at the least")],
)
def test_what_would_fit_is_said(need: Need, room: float, said: str | None) -> None:
    if said is None:
        check_fits(need, int(room), lora=False)
    else:
        with pytest.raises(TrainingError, match=said):
            check_fits(need, int(room), lora=False)


def test_there_is_memory() -> None:
    assert available(torch.device("cpu")) > 1e8
