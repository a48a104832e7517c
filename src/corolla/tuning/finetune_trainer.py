"""transformers' trainer with a recipe's loss, optimizer and schedule, which stops at the first number that is none.

Legend: S sequences, N columns, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from transformers import TrainerCallback, TrainingArguments

from corolla.data.tokens import IGNORED
from corolla.errors import TrainingError
from corolla.models.saving import replacing, save_tensors
from corolla.tuning.batches import SEQUENCES, Collator, SequenceDataset
from corolla.tuning.bloom import quicken
from corolla.tuning.checkpoints import CheckpointingTrainer
from corolla.tuning.logits_loss import trained_loss
from corolla.tuning.recipe import Recipe
from corolla.tuning.run_record import HeldOut

BEST = "best.safetensors"


def optimizer_for(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019), with AMSGrad (Reddi et al., 2018) if the recipe says so. Only matrices decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, amsgrad=recipe.amsgrad)


def schedule_for(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The learning rate over `steps` steps: torch's `OneCycleLR` (Smith & Topin, 2018), a cosine, or constant, after a warm-up."""
    if recipe.schedule == "one-cycle":
        total = max(2, steps)
        return OneCycleLR(
            optimizer,
            max_lr=recipe.learning_rate,
            total_steps=total,
            pct_start=recipe.warmup if recipe.warmup * total != 1 else 0.0,  # it divides by zero where one step is to rise
            anneal_strategy="cos",
            cycle_momentum=False,  # the recipe's betas are fixed
            div_factor=recipe.div_factor,
            final_div_factor=recipe.final_div_factor,
        )
    warmup = recipe.warmup * steps

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if recipe.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1.0, steps - warmup))
        return recipe.end_ratio + (1 - recipe.end_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, share)


class FinetuneTrainer(CheckpointingTrainer):
    """Trains by a recipe. A step's loss is the mean over all trained tokens of its sequences, over all devices.

    `best` is the lowest held-out loss so far; its weights are kept in `BEST` beside the checkpoints.

    Raises `TrainingError`, before the optimizer's step, naming step, batch and sequences, when a loss or a gradient is not finite.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: Recipe,
        arguments: TrainingArguments,
        training: SequenceDataset,
        held_out: SequenceDataset | None,
        collator: Collator,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> None:
        self.recipe = recipe
        self._batch = 0  # of the step under way
        self._seen: list[int] = []  # the sequences of the step under way
        self._tokens = 0
        quicken(model)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=training,
            eval_dataset=held_out,
            callbacks=[_Watch(self), *callbacks],
            compute_loss_func=self._loss,
        )

    @property
    def best(self) -> float | None:
        return self.state.best_metric

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = optimizer_for(model or self.model, self.recipe)  # type: ignore[arg-type]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            schedule: Any = schedule_for(optimizer or self.optimizer, self.recipe, num_training_steps)  # type: ignore[arg-type]
            self.lr_scheduler, self._created_lr_scheduler = schedule, True
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._batch += 1
        sequences = inputs.pop(SEQUENCES).tolist()
        self._seen += sequences
        self._tokens += inputs["input_ids"].numel()
        loss = super().training_step(model, {**inputs, "use_cache": False}, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._diverged("the loss", sequences)
        return loss

    def check_gradients(self) -> None:
        """Raises `TrainingError` when one is not finite."""
        gradients = [parameter.grad for parameter in self._parameters().values() if parameter.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise self._diverged("a gradient", self._seen)

    def step_ended(self) -> None:
        self._batch, self._seen = 0, []

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss of a trained token, without smoothing, as `eval_loss`; and it is `best` if it is the lowest yet."""
        held_out = self.held_out_loss()
        metrics = {"eval_loss": held_out.loss, "eval_perplexity": held_out.perplexity, "eval_tokens": float(held_out.tokens)}
        self.log(dict(metrics))
        if self.is_in_train and (self.best is None or held_out.loss < self.best):
            self._keep_best()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_loss(self) -> HeldOut:
        """Over all held-out sequences. Raises `TrainingError` when it is not finite."""
        model = self.model_wrapped
        assert model is not None, "a trainer has a model"
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            for inputs in self.get_eval_dataloader():
                inputs = self._prepare_inputs(inputs)
                inputs.pop(SEQUENCES)
                labels = inputs.pop("labels")
                loss = trained_loss(model(**inputs, use_cache=False).logits, labels)
                total += torch.stack([loss.double(), (labels[:, 1:] != IGNORED).sum().double()])
        loss, tokens = self.accelerator.reduce(total).tolist()
        if not math.isfinite(loss):
            if not self.state.global_step:
                raise TrainingError(
                    "the held-out loss is not finite before the first step: the model's weights are damaged, fetch it again"
                )
            raise TrainingError(f"the held-out loss is not finite after step {self.state.global_step}: lower the learning rate")
        return HeldOut(self.state.global_step, loss / max(1.0, tokens), int(tokens))

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained, by their names, on the CPU."""
        return self._trained()

    def take_tokens(self) -> int:
        """How many tokens this process has computed since the last call, padding within a batch included."""
        taken, self._tokens = self._tokens, 0
        return taken

    def take_best(self) -> None:
        """Go back to the weights of `best`, where there are any."""
        self.accelerator.wait_for_everyone()  # one process writes them
        file = Path(self.args.output_dir or ".") / BEST
        if file.exists():
            stored = load_file(file)
            with torch.no_grad():
                for name, parameter in self._parameters().items():
                    parameter.copy_(stored[name])

    def _keep_best(self) -> None:
        if self.args.should_save:
            with replacing(Path(self.args.output_dir or ".") / BEST) as temporary:
                save_tensors(self._trained(), temporary)

    def _loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return trained_loss(outputs.logits, labels, smoothing=self.recipe.label_smoothing, divisor=num_items_in_batch)

    def _diverged(self, what: str, sequences: list[int]) -> TrainingError:
        step = self.state.global_step + 1
        named = ", ".join(map(str, sequences[:8])) + (" and others" if len(sequences) > 8 else "")
        return TrainingError(
            f"{what} is not finite in step {step}, batch {self._batch} of {self.args.gradient_accumulation_steps} (sequences {named}): "
            "the last checkpoint is kept; lower the learning rate, clip the gradients, or look at these sequences"
        )


class _Watch(TrainerCallback):
    """Calls the trainer back before and after the optimizer's step."""

    def __init__(self, trainer: FinetuneTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._trainer.step_ended()
        if state.global_step == state.max_steps and self._trainer.eval_dataset is not None:
            control.should_evaluate = True  # the last step may be none of every so many
        return control
