"""A model fine-tuned by a recipe: what `corolla finetune` does, from reading the data to the directory that is saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from transformers import TrainerCallback

from corolla.chat.templates import Template, default_template, template_named
from corolla.data.problems import Problems
from corolla.data.tokens import TrainingTokenizer
from corolla.errors import CorollaError, InvalidSetting, StorageError, TrainingError
from corolla.models.catalog import resolve
from corolla.models.checkpoint import Checkpoint, Progress, json_object
from corolla.models.config import ModelConfig
from corolla.models.devices import settled_device
from corolla.models.families import architecture
from corolla.swarm.records import fingerprint
from corolla.tuning.finetune_data import Loader, PhaseData, parse_source
from corolla.tuning.finetune_run import FinetuneRun, FinetuneSettings, load_model
from corolla.tuning.memory import Need, available, check_fits
from corolla.tuning.recipe import Recipe
from corolla.tuning.run_record import RunRecord, begun_in

RECORD = "finetuning.json"


def finetune(
    name: str,
    data: Sequence[str],
    output: Path,
    recipe: Recipe,
    settings: FinetuneSettings,
    console: Console,
    *,
    format: str | None = None,
    split: str = "train",
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunRecord:
    """Fine-tune the model `name` and save it in `output`, with its card, recipe and record and, until it is done, its checkpoints.

    `data` are sources as `parse_source` takes them; `callbacks` are for transformers' trainer. On SIGINT or SIGTERM the step under
    way is ended and saved, and `KeyboardInterrupt` raised. Of several processes, one for each device, the first one writes and tells.

    Raises:
        TrainingError: there is nothing to go on from, something else lies in `output`, it would not fit the memory, or a loss or a
            gradient is not finite.
        DataError, InvalidSetting, ModelNotFound, UnsupportedModel, CheckpointError, StorageError: as they say.
    """
    settled_device(settings.device)  # which tells of a device that is not used
    process = PartialState(cpu=settings.on.type == "cpu")
    if not process.is_main_process:
        console, progress = Console(quiet=True), None
    before = begun_in(output, resume, RECORD)
    directory = resolve(name, progress=progress)
    with Checkpoint(directory) as checkpoint:
        config = checkpoint.config
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidSetting("model", f"{name} is quantized, and its weights cannot be trained: give the model that it was made from")
    arch = architecture(config)
    tokenizer = TrainingTokenizer(directory)
    template = template_named(recipe.template) if recipe.template else default_template(tokenizer, name)
    problems = Problems(tell=lambda text: console.print(text, markup=False, highlight=False))
    loader = Loader(recipe, tokenizer, template, arch.vocabulary, problems)
    sources = [parse_source(text, recipe) for text in data]
    phases = [loader.load(number, sources, format=format, split=split) for number in range(1, len(recipe.phases) + 1)]
    for phase in phases:
        if phase.max_length > arch.context_length:
            problem = f"sequences of {phase.max_length} tokens do not fit the model's context of {arch.context_length}: make them shorter"
            raise InvalidSetting("max_length", problem)
    micro_batch = _micro_batch(recipe, settings)
    if settings.check_memory:
        _check_memory(directory, arch, recipe, settings, micro_batch, phases)
    record = _record(name, directory, output, recipe, settings, template, phases, arch)
    if before is not None:
        record = _resumed(before, record)
    record.written = process.is_main_process
    process.wait_for_everyone()  # all have seen what there was before anything is written
    try:
        record.update(status="running", error=None)
        model = load_model(directory, recipe, settings)
        FinetuneRun(model, tokenizer, template, recipe, settings, phases, record, console, micro_batch, callbacks).go(directory)
    except KeyboardInterrupt:
        record.update(status="interrupted")
        raise
    except CorollaError as error:
        with suppress(StorageError):  # which may be what happened
            record.update(status="failed", error=str(error))
        raise
    return record


def _micro_batch(recipe: Recipe, settings: FinetuneSettings) -> int:
    devices = PartialState(cpu=settings.on.type == "cpu").num_processes
    micro = settings.micro_batch or max(1, min(recipe.batch, recipe.global_batch // devices))
    if recipe.global_batch % (micro * devices):
        said = f"{micro} sequences on each of {devices} devices do not divide the recipe's {recipe.global_batch} a step evenly"
        raise InvalidSetting("micro-batch", f"{said}; give another number")
    return micro


def _check_memory(
    directory: Path, arch: ModelConfig, recipe: Recipe, settings: FinetuneSettings, micro_batch: int, phases: Sequence[PhaseData]
) -> None:
    parameters = _parameters(directory)
    wide = recipe.dtype == "float32"
    # Of each block four matrices at the most have factors of hidden x rank twice over, and wider ones somewhat more.
    few = arch.blocks * settings.lora_rank * (4 * arch.hidden + 2 * (arch.hidden + arch.intermediate) * 3)
    need = Need(
        arch=arch,
        trained=few if settings.lora else parameters,
        frozen=parameters if settings.lora else 0,
        frozen_bytes=4 if wide else 2,
        amsgrad=recipe.amsgrad,
        sequences=micro_batch,
        length=max(len(sequence) for phase in phases for sequence in phase.training),
        checkpointing=settings.gradient_checkpointing,
        wide=wide,
        scores=arch.alibi is not None and arch.family != "bloom",  # whose attention is fused here
    )
    check_fits(need, available(settings.on), lora=settings.lora)


def _parameters(directory: Path) -> int:
    with Checkpoint(directory) as checkpoint:
        shapes = [checkpoint.shape(name) for name in checkpoint.names]
    return sum(torch.Size(shape).numel() for shape in shapes)


def _record(
    name: str,
    directory: Path,
    output: Path,
    recipe: Recipe,
    settings: FinetuneSettings,
    template: Template,
    phases: Sequence[PhaseData],
    arch: ModelConfig,
) -> RunRecord:
    whole: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    record = RunRecord(output / RECORD, {"recipe": whole, "template": template.name, **asdict(settings)})
    record.model = {
        "name": name,
        "family": arch.family,
        "fingerprint": fingerprint(json_object(directory / "config.json")),
        "dtype": recipe.dtype,
        "device": settings.on.type,
    }
    record.data = {"phases": [{"name": each.name, **data.described} for each, data in zip(recipe.phases, phases, strict=True)]}
    return record


def _resumed(before: RunRecord, now: RunRecord) -> RunRecord:
    """The run as it was. Raises `TrainingError` where another curve would follow."""
    for name in ("recipe", "template", "lora", "lora_rank", "lora_alpha", "micro_batch", "evaluate_every"):
        if before.settings[name] != now.settings[name]:
            raise TrainingError(f"{name.replace('_', '-')} is another than when the run began: resume with the same settings")
    if before.model["fingerprint"] != now.model["fingerprint"]:
        raise TrainingError(f"the run was on another model, {before.model['name']}: resume with that one")
    for old, new in zip(before.data["phases"], now.data["phases"], strict=True):
        if any(old[part]["digest"] != new[part]["digest"] for part in ("training", "held_out")):
            raise TrainingError(f"the data of phase {new['name']!r} is other than when the run began: resume with the same data")
    before.settings, before.model = now.settings, now.model
    return before
