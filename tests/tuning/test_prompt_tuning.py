"""A whole run in this process: what it saves, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from corolla.errors import CorollaError, DataError, InvalidSetting, ModelNotFound, TrainingError
from corolla.models.families import architecture
from corolla.models.prompts import load_prompt
from corolla.remote.models import AutoDistributedConfig
from corolla.tuning.checkpoints import last_checkpoint
from corolla.tuning.run_record import RunRecord, read_record
from tests.tuning.conftest import Tune

NO_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")


def losses(record: RunRecord) -> list[float]:
    return [entry["loss"] for entry in record.curve]


class At(TrainerCallback):
    """Does something before step `step` (from 1), or, with `gradients`, between its backward and the optimizer."""

    def __init__(self, step: int, act: Callable[[], object] = lambda: None, gradients: float | None = None) -> None:
        self.step, self.act, self.gradients = step, act, gradients

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.gradients is not None and state.global_step + 1 == self.step:
            model.prompts.tokens.grad.fill_(self.gradients)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise TrainingError("it is of no use")


def interrupted(tuning: Tune, step: int, out: str = "prompt", **settings: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuning(out, "llama", At(step, interrupt), **settings)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_it_saves_a_prompt_and_its_record(tuning: Tune, models: dict[str, Path], tmp_path: Path, mode: str) -> None:
    record = tuning(mode=mode, evaluate_every=3)
    out = tmp_path / "prompt"
    prompt = load_prompt(out, architecture(AutoDistributedConfig.from_pretrained(models["llama"])))
    assert (prompt.deep is not None) == (mode == "deep_ptune")
    assert record.prompt == {"mode": mode, "tokens": 4, "hidden": 64, "digest": prompt.digest}
    assert [entry["step"] for entry in record.curve] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in record.evaluations] == [3, 6]
    assert record.base is not None
    assert record.evaluations[-1]["loss"] < record.base["loss"]
    assert all(isinstance(sample["before"], str) and isinstance(sample["after"], str) for sample in record.samples)
    assert record.samples
    stored = json.loads((out / "tuning.json").read_bytes())
    assert stored["status"] == "done"
    assert stored["perplexity"] < stored["base_perplexity"]
    assert stored["data"]["training"]["trained_tokens"] < stored["data"]["training"]["tokens"]
    names = [path.name for path in out.rglob("*")]
    assert not [name for name in names if name.endswith(NO_PICKLES) or name.startswith((".", "checkpoint"))]


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_an_interrupted_run_goes_on_to_the_same_curve(tuning: Tune, tmp_path: Path, mode: str) -> None:
    whole = tuning("whole", mode=mode)
    interrupted(tuning, 3, "parts", mode=mode)
    checkpoint = last_checkpoint(tmp_path / "parts")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    assert not [path for path in checkpoint.iterdir() if path.suffix in NO_PICKLES]
    halted = read_record(tmp_path / "parts")
    assert halted is not None
    assert (halted.status, halted.steps) == ("interrupted", {"done": 3, "total": 6})
    parts = tuning("parts", mode=mode, resume=True)
    assert losses(parts) == losses(whole)
    assert parts.prompt["digest"] == whole.prompt["digest"]
    assert parts.evaluations == whole.evaluations


def test_steps_after_the_last_checkpoint_are_done_again(tuning: Tune, tmp_path: Path) -> None:
    whole = tuning("whole")
    with pytest.raises(TrainingError, match="no use"):
        tuning("parts", "llama", At(6, fail), save_every=2)
    failed = read_record(tmp_path / "parts")
    assert failed is not None
    assert (failed.status, failed.error) == ("failed", "it is of no use")
    parts = tuning("parts", save_every=2, resume=True)
    assert losses(parts) == losses(whole)
    assert (parts.status, parts.error, len(parts.curve)) == ("done", None, 6)


def test_a_run_that_diverges_stops_with_its_last_good_prompt(tuning: Tune, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"NaN or infinite.*--learning-rate"):
        tuning("prompt", "llama", At(4, gradients=float("nan")), save_every=1)
    load_prompt(tmp_path / "prompt", architecture(AutoDistributedConfig.from_pretrained(models["llama"])))
    record = read_record(tmp_path / "prompt")
    assert record is not None
    assert record.status == "failed"
    assert "--learning-rate" in str(record.error)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data": {"data": "nowhere.jsonl"}}, DataError, "does not exist"),
        ({"data": {"max_length": 8}}, DataError, "raise --max-length"),
        ({"data": {"max_length": 20, "truncation": "drop"}}, DataError, "longer than 20 tokens"),
        ({"data": {"max_length": 510}}, InvalidSetting, "508 fit"),
        ({"data": {"held_out": 0.001}}, DataError, "none is held out"),
        ({"data": {"held_out": 1.0}}, InvalidSetting, "held-out"),
        ({"data": {"loss": "some"}}, InvalidSetting, "loss"),
        ({"batch": 0}, InvalidSetting, "batch"),
        ({"learning_rate": float("nan")}, InvalidSetting, "learning-rate"),
        ({"report_to": "paper"}, InvalidSetting, "there is no 'paper'"),
        ({"mode": "shallow"}, InvalidSetting, "shallow"),
        ({"template": "none"}, InvalidSetting, "template"),
        ({"resume": True}, TrainingError, "no run to go on with"),
    ],
)
def test_what_cannot_be_done_is_said(tuning: Tune, tmp_path: Path, changes: dict[str, Any], error: type[CorollaError], words: str) -> None:
    with pytest.raises(error, match=words):
        tuning(**changes)
    assert not list(tmp_path.rglob("adapter*"))


def test_an_empty_file_is_no_data(tuning: Tune, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no dialogue"):
        tuning(data={"data": str(tmp_path / "empty.jsonl")})


def test_another_model_or_directory_is_refused(tuning: Tune, tmp_path: Path, models: dict[str, Path]) -> None:
    interrupted(tuning, 1)
    for changes, words in [
        ({}, "add --resume"),
        ({"resume": True, "learning_rate": 0.02}, "--learning-rate was 0.01 and is 0.02"),
        ({"resume": True, "model": "bloom", "template": "plain"}, "--template was|another model"),
        ({"resume": True, "data": {"samples": 12}}, "--samples"),
    ]:
        with pytest.raises(TrainingError, match=words):
            tuning(**changes)
    tuning(resume=True)
    with pytest.raises(TrainingError, match="is done"):
        tuning(resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="is a file"):
        tuning("file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(TrainingError, match="not empty"):
        tuning("full")
    models["none"] = tmp_path / "none"
    with pytest.raises(ModelNotFound):
        tuning("new", model="none")
    del models["none"]


def test_a_damaged_checkpoint_is_said(tuning: Tune, tmp_path: Path) -> None:
    interrupted(tuning, 2)
    checkpoint = last_checkpoint(tmp_path / "prompt")
    assert checkpoint is not None
    for name in ("trained.safetensors", "optimizer.safetensors", "schedule.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(TrainingError, match="damaged"):
            tuning(resume=True)
        (checkpoint / name).write_bytes(content)
    tuning(resume=True)
