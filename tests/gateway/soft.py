"""Soft prompts and the records of their training, as `corolla tune` leaves them in a directory."""

from __future__ import annotations

from pathlib import Path

import torch

from corolla.models.checkpoint import read_config
from corolla.models.families import architecture
from corolla.models.prompts import SoftPrompt, save_prompt
from corolla.tuning.run_record import RECORD, RunRecord, Status


def make_prompt(directory: Path, model: Path, tokens: int, *, deep: bool = False) -> None:
    """One of random rows that change what the model says."""
    shape = architecture(read_config(model))
    torch.manual_seed(3)
    rows = torch.randn(tokens, shape.hidden)
    save_prompt(directory, SoftPrompt(rows, torch.randn(shape.blocks, tokens, shape.hidden) if deep else None), shape)


def make_record(directory: Path, status: Status = "done") -> None:
    """A record of 40 steps, or of the first 20 of a run that has not ended."""
    directory.mkdir(exist_ok=True)
    done = 40 if status == "done" else 20
    record = RunRecord(directory / RECORD, settings={"steps": 40}, status=status)
    for step in range(1, done + 1):
        record.point(step=step, loss=4 - step / 20, learning_rate=0.1, seconds=0.5, tokens=64)
    record.update(
        steps={"done": done, "total": 40},
        data={"source": "dialogues.txt"},
        evaluations=[{"step": step, "loss": 4 - step / 25, "perplexity": 9.0, "tokens": 500} for step in sorted({20, done})],
        base={"step": 0, "loss": 4.0, "perplexity": 54.6, "tokens": 500},
        samples=[
            {"conversation": [{"role": "user", "content": "Who are you?"}], "system": None, "reference": "me", "before": "a", "after": "b"}
        ],
    )
