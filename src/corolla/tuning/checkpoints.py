"""transformers' trainer with checkpoints that hold no pickle, are there whole or not at all, and resume to the same curve."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer

from corolla.errors import StorageError, TrainingError
from corolla.models.json_files import read_json
from corolla.models.saving import save_tensors

TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "trainer_state.json"
_REST = "schedule.json"  # what of optimizer and schedule is no tensor
_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(directory: Path) -> Path | None:
    """The latest complete checkpoint in `directory`, if there is any."""
    found = [(int(match[1]), path) for path in directory.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return max(found)[1] if found else None


def remove_checkpoints(directory: Path, *, but: Path | None = None) -> None:
    """Remove the checkpoints in `directory`, begun ones too, all `but` one."""
    for path in (*directory.glob("checkpoint-*"), *directory.glob(".checkpoint-*")):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


class CheckpointingTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints are safetensors and JSON. Only the last one is kept.

    A checkpoint holds the parameters that are trained, the optimizer's and the schedule's state and that of torch's random
    numbers; its directory is written beside its place, synced and renamed. What the stock trainer writes instead
    (`optimizer.pt`, `rng_state.pth`, `training_args.bin`) are pickles, which run code when they are read.

    `train(resume_from_checkpoint=...)` raises `TrainingError` for a checkpoint that is damaged or of other parameters, and saving
    raises `StorageError` when the disk refuses.
    """

    def save_checkpoint(self) -> Path:
        """Save where training stands, after its last whole step."""
        assert self.model is not None, "a trainer has a model"
        self._save_checkpoint(self.model, None)
        return Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"

    # The four methods by which the stock trainer writes and reads its files.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        assert self.optimizer is not None, "training has begun"
        assert self.lr_scheduler is not None, "training has begun"
        output = Path(self.args.output_dir or ".")
        target = output / f"checkpoint-{self.state.global_step}"
        self.accelerator.wait_for_everyone()
        if target.exists() or not self.args.should_save:
            return  # nothing has been trained since, or another process of the run writes it
        work = output / f".{target.name}"
        optimizer = self.optimizer.state_dict()
        tensors, rest = _apart(optimizer["state"])
        schedule = {"state": rest, "param_groups": optimizer["param_groups"], "schedule": self.lr_scheduler.state_dict()}
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            save_tensors(self._trained(), work / TRAINED)
            save_tensors({**tensors, **_random_states(self.args.device)}, work / OPTIMIZER)
            (work / _REST).write_text(json.dumps(schedule), encoding="utf-8")
            self.state.save_to_json(str(work / STATE))
            for path in (*work.iterdir(), work):
                _sync(path)
            work.rename(target)
            _sync(output)
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise StorageError(f"{target} cannot be written: {error.strerror or error}") from None
        remove_checkpoints(output, but=target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        stored, trained = _read(Path(resume_from_checkpoint) / TRAINED), self._parameters()
        if {name: tensor.shape for name, tensor in stored.items()} != {name: tensor.shape for name, tensor in trained.items()}:
            raise TrainingError(f"{resume_from_checkpoint} holds other parameters than are trained: give the settings that it began with")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None, "training has begun"
        assert self.lr_scheduler is not None, "training has begun"
        path = Path(checkpoint)
        try:
            rest = read_json(path / _REST)
            state = {int(index): {**values} for index, values in rest["state"].items()}
            for name, tensor in _read(path / OPTIMIZER).items():
                index, _, key = name.partition(".")
                if index != "random":
                    state[int(index)][key] = tensor
            self.optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
            self.lr_scheduler.load_state_dict(rest["schedule"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} is damaged ({error}): remove it to begin anew") from None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = _read(Path(checkpoint) / OPTIMIZER)
        torch.set_rng_state(states["random.cpu"])
        if self.args.device.type == "cuda" and "random.cuda" in states:
            torch.cuda.set_rng_state(states["random.cuda"], self.args.device)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        assert self.model is not None, "a trainer has a model"
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().cpu().contiguous() for name, parameter in self._parameters().items()}


def _apart(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """An optimizer's state as tensors, by `parameter.key`, and the rest, by parameter."""
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, values in state.items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    rest = {
        str(index): {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)} for index, values in state.items()
    }
    return tensors, rest


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} is missing or damaged ({error}): remove its directory to begin anew") from None


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
