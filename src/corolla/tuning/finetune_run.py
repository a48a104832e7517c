"""A fine-tuning under way: the model, its phases one after another, and what is saved at the end."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from corolla.chat.templates import Template
from corolla.data.saving import write_sums
from corolla.data.tokens import TrainingTokenizer
from corolla.errors import CheckpointError, InvalidSetting, StorageError, TrainingError
from corolla.models.saving import disk_error, replacing, save_tensors
from corolla.tuning.batches import Collator, SequenceDataset, wants_mask
from corolla.tuning.chat_template import jinja_of
from corolla.tuning.checkpoints import last_checkpoint
from corolla.tuning.divergence import Divergence
from corolla.tuning.evaluation import check_loss
from corolla.tuning.finetune_data import PhaseData
from corolla.tuning.finetune_trainer import FinetuneTrainer
from corolla.tuning.model_card import CARD, model_card
from corolla.tuning.recipe import Recipe
from corolla.tuning.reporting import Interruption, TrainingBar, check_reporter
from corolla.tuning.run_record import RunRecord

if TYPE_CHECKING:
    from rich.console import Console


TRAINING = "training"  # the directory of checkpoints in the output, while there is something to go on with
RECIPE = "recipe.yaml"
_CURVES = "runs"  # where transformers has tensorboard write, in the directory of checkpoints
_END = "end.safetensors"  # what a finished phase leaves to the next one
_EVALUATIONS = 10  # in a phase


def load_model(directory: Path, recipe: Recipe, settings: FinetuneSettings) -> torch.nn.Module:
    """The model to train. Trained weights are float32; those that LoRA freezes are of the recipe's dtype.

    Raises `CheckpointError` when the files do not make one.
    """
    logging.disable_progress_bar()  # there is one of our own
    frozen = getattr(torch, recipe.dtype) if settings.lora else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=frozen, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory} is not a whole model ({str(error).splitlines()[0]}): fetch it again") from None
    if settings.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(recipe.seed)
        config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT looks for checkpointing by a name that transformers gives up
            model = get_peft_model(model, config)
        if settings.gradient_checkpointing:
            model.enable_input_require_grads()
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """What does not change what is learned, but `lora`, which trains low-rank factors (Hu et al., 2021) in place of the weights.

    Args:
        micro_batch: sequences of one forward on each device; None is the recipe's batch.
        gradient_checkpointing: compute blocks anew in the backward, for less memory.
        lora_rank, lora_alpha: the factors' rank, and their scale times the rank.
        evaluate_every: steps between two evaluations and checkpoints; None is ten in each phase.
        report_to: one of `reporting.REPORTERS`.
        device: "cpu" or "cuda"; the CPU by default.
        check_memory: refuse what would not fit.

    Raises `InvalidSetting` for a value outside its range.
    """

    lora: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    report_to: str = "none"
    device: Literal["cpu", "cuda"] | None = None
    licence: str | None = None
    check_memory: bool = True

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha", "micro_batch", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidSetting(name.replace("_", "-"), f"{value} is not at least 1")
        if self.device not in (None, "cpu", "cuda"):
            raise InvalidSetting("device", f"{self.device!r} is neither cpu nor cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InvalidSetting("device", "this machine has no GPU that torch can use; leave it out")
        check_reporter(self.report_to)

    @property
    def on(self) -> torch.device:
        return torch.device(self.device or "cpu")


class FinetuneRun:
    """The parts of a run, by which `go` reads like what happens."""

    def __init__(
        self,
        model: Any,
        tokenizer: TrainingTokenizer,
        template: Template,
        recipe: Recipe,
        settings: FinetuneSettings,
        phases: Sequence[PhaseData],
        record: RunRecord,
        console: Console,
        micro_batch: int,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._recipe, self._settings, self._phases = recipe, settings, phases
        self._record, self._console, self._micro_batch = record, console, micro_batch
        self._output = record.path.parent
        self._callbacks = callbacks
        self._devices, self._main = PartialState().num_processes, PartialState().is_main_process
        articles = any((data.training + data.held_out) for data in phases)
        mask_dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
        needs = articles and recipe.packing != "single" and wants_mask(model)
        self._collator = Collator(tokenizer.end_id, wants_mask=needs, mask_dtype=mask_dtype)

    def go(self, base: Path) -> None:
        if self._main:
            with replacing(self._output / RECIPE) as temporary:
                temporary.write_text(self._recipe.dump(), encoding="utf-8")
        self._record.steps = {**self._record.steps, "total": sum(map(self._steps, range(len(self._phases))))}
        offset = 0
        for index in range(len(self._phases)):
            self._phase(index, offset)
            offset += self._steps(index)
        PartialState().wait_for_everyone()  # nobody reads the checkpoints any more
        if self._main:
            self._record.final = self._final()
            self._save(base)
            self._keep_curves()
            self._record.update(status="done")
            shutil.rmtree(self._output / TRAINING, ignore_errors=True)

    def _keep_curves(self) -> None:
        """Move what tensorboard is shown out of the directory of checkpoints, which goes."""
        for found in sorted((self._output / TRAINING).glob(f"*/{_CURVES}")):
            place = self._output / _CURVES / found.parent.name
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            shutil.move(found, place)

    def _steps(self, index: int) -> int:
        """As transformers counts them: what is left of an epoch is a step too."""
        batches = math.ceil(len(self._phases[index].training) / (self._micro_batch * self._devices))
        accumulation = self._recipe.global_batch // (self._micro_batch * self._devices)
        return math.ceil(math.ceil(batches / accumulation) * self._recipe.phases[index].epochs)

    def _phase(self, index: int, offset: int) -> None:
        directory = self._output / TRAINING / f"phase-{index + 1}"
        if (directory / _END).exists():
            self._take(directory / _END)
            return
        torch.manual_seed(self._recipe.seed)
        record, data, phase = self._record, self._phases[index], self._recipe.phases[index]
        bar, interruption = TrainingBar(self._console), Interruption(self._console)
        recipe = self._recipe.for_phase(index)
        held_out = SequenceDataset(data.held_out) if data.held_out else None
        arguments = self._arguments(directory, index, phase.epochs, held_out is not None)
        trainer = FinetuneTrainer(self._model, recipe, arguments, SequenceDataset(data.training), held_out, self._collator)
        trainer.remove_callback(PrinterCallback)  # which prints what the bar shows
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        for callback in (Divergence(vocabulary), _Keeping(trainer, record, offset), bar, interruption, *self._callbacks):
            trainer.add_callback(callback)
        if held_out is not None and record.base is None and not index:
            self._console.print("measuring the held-out loss before training ...")
            base = trainer.held_out_loss()
            remedy = "its weights are damaged, or the tokenizer and the template are not the model's"
            check_loss(base.loss, vocabulary, "before training", remedy)
            record.update(base={name: value for name, value in base.fields.items() if name != "step"})
        checkpoint = last_checkpoint(directory)
        record.back_to(offset + (int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0))
        if len(self._phases) > 1:
            self._console.print(f"phase {index + 1} of {len(self._phases)}: {phase.name}")
        try:
            with interruption.listening():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            bar.close()
        if interruption.signal is not None and trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        if held_out is not None:
            trainer.take_best()
        if self._main:
            with replacing(directory / _END) as temporary:
                save_tensors(trainer.trained_tensors(), temporary)

    def _take(self, file: Path) -> None:
        """Go on with the weights that a phase left."""
        stored = load_file(file)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad:
                    if name not in stored or stored[name].shape != parameter.shape:
                        raise TrainingError(f"{file} holds other parameters than are trained: remove {self._output} to begin anew")
                    parameter.copy_(stored[name])

    def _arguments(self, directory: Path, index: int, epochs: float, evaluates: bool) -> TrainingArguments:
        recipe, settings = self._recipe, self._settings
        every = settings.evaluate_every or max(1, self._steps(index) // _EVALUATIONS)
        return TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=self._micro_batch,
            per_device_eval_batch_size=self._micro_batch,
            gradient_accumulation_steps=recipe.global_batch // (self._micro_batch * self._devices),
            num_train_epochs=epochs,
            bf16=recipe.dtype == "bfloat16",
            use_cpu=settings.on.type == "cpu",
            max_grad_norm=recipe.clip or 0.0,
            activation_checkpointing=settings.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
            seed=recipe.seed,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            label_names=["labels"],
            dataloader_pin_memory=settings.on.type == "cuda",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=every,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=every if evaluates else None,
            metric_for_best_model="loss" if evaluates else None,
            greater_is_better=False if evaluates else None,
            report_to=settings.report_to,
            run_name=f"{self._output.name} {recipe.phases[index].name} {self._record.started}",
            project="corolla",
            disable_tqdm=True,
        )

    def _save(self, base: Path) -> None:
        """The model as transformers saves one: written beside its place, synced, and moved, its configuration last."""
        work = self._output / TRAINING / "model"
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        if not self._template.own:
            tokenizer.chat_template = jinja_of(self._template)
            tokenizer.init_kwargs["stop_sequences"] = list(self._template.stop_sequences)
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            lora = self._settings.lora
            if not lora:
                self._model.to(self._dtype(base))
            self._model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            if tokenizer.chat_template is not None:
                _into_configuration(work / "tokenizer_config.json", tokenizer.chat_template)
            card = model_card(
                self._record,
                final=self._record.final,
                name=self._output.resolve().name,
                base=self._record.model["name"],
                recipe=self._recipe.dump(),
                licence=self._settings.licence,
                chat=tokenizer.chat_template is not None,
                lora=lora,
            )
            (work / CARD).write_text(card, encoding="utf-8")
            files = sorted(work.iterdir(), key=lambda file: (file.name == "config.json", file.name))
            for file in files:
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            for file in files:
                os.replace(file, self._output / file.name)
        except (OSError, SafetensorError) as error:
            cause = error if isinstance(error, OSError) else disk_error(error)
            raise StorageError(f"{self._output} cannot be written: {cause.strerror or cause}") from None
        write_sums(self._output, self._output.glob("*.safetensors"))

    def _final(self) -> dict[str, Any] | None:
        """The evaluation of the model that is saved: the best of the last phase."""
        before = sum(map(self._steps, range(len(self._phases) - 1)))
        own = [entry for entry in self._record.evaluations if entry["step"] > before]
        return min(own, key=lambda entry: entry["loss"], default=None)

    def _dtype(self, base: Path) -> torch.dtype:
        from transformers import AutoConfig

        dtype = AutoConfig.from_pretrained(base, local_files_only=True).dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _into_configuration(file: Path, template: str) -> None:
    """Put a chat template where every version of transformers finds it: newer ones write it beside the configuration only."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "chat_template": template}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Keeping(TrainerCallback):
    """Writes a phase's curve and evaluations into the record; `offset` is how many steps the phases before had."""

    def __init__(self, trainer: FinetuneTrainer, record: RunRecord, offset: int) -> None:
        self._trainer, self._record, self._offset = trainer, record, offset
        self._last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        now = time.monotonic()
        self._record.point(
            step=self._offset + state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            seconds=now - self._last,
            tokens=self._trainer.take_tokens(),
        )
        self._last = now

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> None:
        assert metrics is not None, "an evaluation has figures"
        entry = {"step": self._offset + state.global_step, "loss": metrics["eval_loss"], "perplexity": metrics["eval_perplexity"]}
        self._record.evaluations.append({**entry, "tokens": int(metrics["eval_tokens"])})
        self._record.write()
