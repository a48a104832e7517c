"""A prompt tuned from dialogues: what `corolla tune` does, from reading the data to the prompt that is saved.

Prompt tuning is that of Lester et al. (2021), as PEFT computes it; at every block it is Petals' deep prompt tuning, after
Liu et al. (P-Tuning v2, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments

from corolla.chat.templates import Template, default_template, template_named
from corolla.data.problems import Problems
from corolla.data.tokens import TrainingTokenizer
from corolla.errors import CallerError, CorollaError, InvalidSetting, StorageError, TrainingError
from corolla.models.catalog import resolve
from corolla.models.checkpoint import Progress, json_object
from corolla.models.devices import settled_device
from corolla.models.families import architecture
from corolla.models.prompts import save_prompt
from corolla.remote.modeling import DistributedForCausalLM
from corolla.remote.models import AutoDistributedConfig, AutoDistributedModelForCausalLM
from corolla.remote.prompts import TuningMode, soft_prompts
from corolla.swarm.records import fingerprint
from corolla.tuning.checkpoints import last_checkpoint, remove_checkpoints
from corolla.tuning.dialogues import DataSettings, Dialogues, in_order, load_dialogues
from corolla.tuning.divergence import Divergence
from corolla.tuning.evaluation import check_loss
from corolla.tuning.prompt_trainer import Keeping, PromptTrainer, TunedModel
from corolla.tuning.replies import conversations, reply, without_prompt
from corolla.tuning.reporting import Interruption, TrainingBar, check_reporter
from corolla.tuning.run_record import RECORD, HeldOut, RunRecord, begun_in

if TYPE_CHECKING:
    from rich.console import Console

_SAMPLES = 2  # replies before and after
_FREE = ("report_to", "save_every", "device")  # what may be another when a run is resumed


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """How a prompt is trained: by AdamW, with a learning rate that falls linearly to 0, gradients clipped at a norm of 1.

    Args:
        mode: "ptune" trains rows in front of the input, "deep_ptune" at every block too.
        prompt_tokens: rows.
        batch: dialogues of one step.
        epochs: times that each dialogue is seen; `steps` says instead how many steps there are.
        save_every: steps between two checkpoints.
        evaluate_every: steps between two measurements of the held-out loss; None measures at the end only.
        report_to: one of `reporting.REPORTERS`.
        dtype: that the embeddings and the head, and blocks in this process, are computed in.
        device: "cpu" or "cuda", of the same; the CPU by default.

    Raises `InvalidSetting` for a value outside its range.
    """

    mode: TuningMode = "ptune"
    prompt_tokens: int = 16
    batch: int = 8
    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    save_every: int = 50
    evaluate_every: int | None = None
    report_to: str = "trackio"
    dtype: str = "float32"
    device: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "batch", "steps", "save_every", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidSetting(name.replace("_", "-"), f"{value} is not at least 1")
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidSetting(name.replace("_", "-"), f"{getattr(self, name):g} is not more than 0")
        if not 0 <= self.weight_decay < math.inf:
            raise InvalidSetting("weight-decay", f"{self.weight_decay:g} is not at least 0")
        if self.device not in (None, "cpu", "cuda"):
            raise InvalidSetting("device", f"{self.device!r} is neither cpu nor cuda")
        check_reporter(self.report_to)


def tune(
    name: str,
    output: Path,
    data: DataSettings,
    settings: TuneSettings,
    console: Console,
    *,
    peers: Sequence[str] = (),
    secret: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **servers: Any,
) -> RunRecord:
    """Tune a prompt for the model `name` and save it in `output`, with its record and, until it is done, its last checkpoint.

    On SIGINT or SIGTERM the step under way is ended and saved, and `KeyboardInterrupt` raised.

    Args:
        console: where progress is shown.
        peers, secret: of a swarm; without peers the blocks are in this process.
        resume: go on with the run in `output`, by the same settings.
        callbacks: of the trainer, beside its own.
        servers: `remote.servers.RemoteConfig`'s.

    Raises:
        TrainingError: there is nothing to go on from, something else lies in `output`, or the loss is not finite any more.
        DataError, InvalidSetting, ModelNotFound, UnsupportedModel, StorageError, NoRoute, ServerFault, NetworkError: as they say.
    """
    before = begun_in(output, resume)
    device = settled_device(settings.device)
    directory = resolve(name, weights=False, progress=progress)
    tokenizer = TrainingTokenizer(directory)
    template = template_named(settings.template) if settings.template else default_template(tokenizer, name)
    arch = architecture(AutoDistributedConfig.from_pretrained(directory))
    if settings.prompt_tokens + data.max_length > arch.context_length:
        room = arch.context_length - settings.prompt_tokens
        raise InvalidSetting("max-length", f"beside {settings.prompt_tokens} soft tokens {room} fit the model's context: lower it")
    dialogues = load_dialogues(data, tokenizer, template, Problems())
    steps = settings.steps or math.ceil(settings.epochs * len(dialogues.training.articles) / settings.batch)
    record = RunRecord(output / RECORD, {**asdict(data), **asdict(settings), "template": template.name})
    record.model = {
        "name": name,
        "family": arch.family,
        "fingerprint": fingerprint(json_object(directory / "config.json")),
        "dtype": settings.dtype,
        "device": device,
        "peers": len(peers),
    }
    record.data = dialogues.described
    record.prompt = {"mode": settings.mode, "tokens": settings.prompt_tokens, "hidden": arch.hidden, "digest": None}
    record.steps = {"done": 0, "total": steps}
    if before is not None:
        record = _resumed(before, record)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        name, initial_peers=peers, secret=secret, torch_dtype=settings.dtype, device=device, progress=progress, **servers
    )
    try:
        run = _Run(model, dialogues, tokenizer, template, data.seed, settings, record, console, callbacks)
        record.update(status="running", error=None)
        run.go()
    except KeyboardInterrupt:
        record.update(status="interrupted")
        raise
    except CorollaError as error:
        with suppress(StorageError):  # which may be what happened
            record.update(status="failed", error=str(error))
        raise
    finally:
        model.close()
    return record


class _Run:
    """The parts of a run, by which `go` reads like what happens."""

    def __init__(
        self,
        model: DistributedForCausalLM,
        dialogues: Dialogues,
        tokenizer: TrainingTokenizer,
        template: Template,
        seed: int,
        settings: TuneSettings,
        record: RunRecord,
        console: Console,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._model, self._dialogues, self._tokenizer, self._template = model, dialogues, tokenizer, template
        self._seed, self._settings, self._record, self._console = seed, settings, record, console
        self._callbacks = callbacks
        self._output = record.path.parent
        weights = model.get_input_embeddings().weight
        assert isinstance(weights, torch.Tensor)
        torch.manual_seed(seed)
        model.bare.prompts = soft_prompts(settings.mode, settings.prompt_tokens, weights, architecture(model.config).blocks)
        self._tuned = TunedModel(model)
        self._vocabulary = architecture(model.config).vocabulary

    def go(self) -> None:
        record = self._record
        if record.base is None:
            self._look_before()
        self._train()
        if self._dialogues.held_out.articles and not any(each["step"] == record.steps["done"] for each in record.evaluations):
            self._measure(record.steps["done"])
        for sample in record.samples:
            sample["after"] = reply(self._model, self._tokenizer, self._template, sample)
        self._save()
        record.update(status="done")
        remove_checkpoints(self._output)

    def _look_before(self) -> None:
        """The model on its own: its perplexity, and replies."""
        record, held_out = self._record, self._dialogues.held_out
        with without_prompt(self._model):
            if held_out.articles:
                self._console.print("measuring the perplexity without a prompt ...")
                loss, tokens = self._tuned.held_out_loss(held_out.articles, self._settings.batch)
                remedy = "its weights are damaged, or the tokenizer and the template are not the model's"
                check_loss(loss, self._vocabulary, "before training", remedy)
                record.base = {name: value for name, value in HeldOut(0, loss, tokens).fields.items() if name != "step"}
            record.samples = conversations(held_out.examples or self._dialogues.training.examples, self._template, _SAMPLES)
            for sample in record.samples:
                sample["before"] = reply(self._model, self._tokenizer, self._template, sample)
        record.write()

    def _measure(self, step: int) -> HeldOut:
        loss, tokens = self._tuned.held_out_loss(self._dialogues.held_out.articles, self._settings.batch)
        remedy = "the last checkpoint is kept; begin again with a lower --learning-rate"
        check_loss(loss, self._vocabulary, f"on held-out dialogues after step {step}", remedy)
        measured = HeldOut(step, loss, tokens)
        self._record.evaluations.append(measured.fields)
        self._record.write()
        return measured

    def _train(self) -> None:
        settings, record = self._settings, self._record
        steps, bar, interruption = record.steps["total"], TrainingBar(self._console), Interruption(self._console)
        articles = in_order(self._dialogues.training.articles, steps, settings.batch, self._seed)
        callbacks = [Divergence(self._vocabulary), Keeping(self._tuned, record, self._save), bar, interruption, *self._callbacks]
        trainer = PromptTrainer(self._tuned, articles, self._measure, self._arguments(), callbacks)
        checkpoint = last_checkpoint(self._output)
        if checkpoint is not None:
            record.back_to(int(checkpoint.name.rpartition("-")[2]))
        try:
            with interruption.listening():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except CallerError:
            raise
        except CorollaError:
            if trainer.state.global_step:
                trainer.save_checkpoint()  # the servers failed, and what was trained is as good as before
                self._save()
            raise
        finally:
            bar.close()
        if interruption.signal is not None and trainer.state.global_step < steps:
            raise KeyboardInterrupt

    def _save(self) -> None:
        prompt, model = self._tuned.prompt, self._model
        save_prompt(self._output, prompt, architecture(model.config), base_model=self._record.model["name"])
        self._record.update(prompt={**self._record.prompt, "digest": prompt.digest})

    def _arguments(self) -> TrainingArguments:
        settings = self._settings
        evaluates = settings.evaluate_every is not None and bool(self._dialogues.held_out.articles)
        arguments = TrainingArguments(
            output_dir=str(self._output),
            max_steps=self._record.steps["total"],
            per_device_train_batch_size=settings.batch,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            optim="adamw_torch",
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            lr_scheduler_type="linear",
            seed=self._seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=settings.save_every,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=settings.evaluate_every if evaluates else None,
            report_to=settings.report_to,
            run_name=f"{self._output.name} {self._record.started}",
            project="corolla",
            disable_tqdm=True,
            use_cpu=self._record.model["device"] == "cpu",
        )
        _ = arguments.device  # which counts the devices
        arguments._n_gpu = min(1, arguments.n_gpu)  # the blocks are elsewhere: nothing is gained by copies of the rest
        return arguments


def _resumed(before: RunRecord, now: RunRecord) -> RunRecord:
    """The run as it was, with what may have changed. Raises `TrainingError` where another curve would follow."""
    differing = [name for name, value in now.settings.items() if name not in _FREE and before.settings.get(name) != value]
    if differing:
        name = differing[0]
        raise TrainingError(
            f"--{name.replace('_', '-')} was {before.settings.get(name)!r} and is {now.settings[name]!r}: resume with the same settings"
        )
    if before.model["fingerprint"] != now.model["fingerprint"]:
        raise TrainingError(f"the run was on another model, {before.model['name']}: resume with that one")
    for part in ("training", "held_out"):
        if before.data[part]["digest"] != now.data[part]["digest"]:
            raise TrainingError(f"{now.data['source']} gives other dialogues than when the run began: resume with the same data")
    before.settings, before.model = now.settings, now.model
    return before
