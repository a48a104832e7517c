"""A distributed model and its soft prompt as transformers' trainer wants them, and that trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from corolla.data.tokens import Tokens
from corolla.errors import PromptError, TrainingError
from corolla.models.prompts import SoftPrompt
from corolla.remote.modeling import DistributedForCausalLM
from corolla.remote.prompts import SoftPrompts
from corolla.tuning.checkpoints import CheckpointingTrainer
from corolla.tuning.dialogues import collate
from corolla.tuning.loss import summed_loss
from corolla.tuning.run_record import HeldOut, RunRecord


class TunedModel(nn.Module):
    """`model` with the soft prompt `model.bare.prompts`, which alone is trained.

    `rows` counts what was computed: tokens without padding, and soft tokens.
    """

    accepts_loss_kwargs = True  # the trainer says how many tokens of all micro-batches are trained on

    def __init__(self, model: DistributedForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.rows = 0

    @property
    def prompts(self) -> SoftPrompts:
        prompts = self.model.bare.prompts
        assert prompts is not None, "a model that is tuned has a prompt"
        return prompts

    @property
    def prompt(self) -> SoftPrompt:
        """A copy. Raises `TrainingError` when it is not finite any more."""
        try:
            return self.prompts.as_they_are()
        except PromptError:
            raise TrainingError("the prompt became NaN or infinite: begin again with a lower --learning-rate") from None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The mean loss of a trained token, as the trainer wants it. Raises `TrainingError` when it is not finite."""
        loss, count = summed_loss(self.model, input_ids, attention_mask, labels)
        if not bool(loss.isfinite()):
            raise TrainingError("the loss became NaN or infinite: begin again with a lower learning rate")
        self.rows += int(attention_mask.sum()) + len(input_ids) * len(self.prompts)
        return {"loss": loss / (count if num_items_in_batch is None else num_items_in_batch)}

    def held_out_loss(self, articles: Sequence[Tokens], batch: int) -> tuple[float, int]:
        """The mean loss of a trained token of `articles`, in nats, and how many they are."""
        total, count = 0.0, 0
        with torch.no_grad():
            for begin in range(0, len(articles), batch):
                inputs = {name: tensor.to(self.model.device) for name, tensor in collate(articles[begin : begin + batch]).items()}
                loss, trained = summed_loss(self.model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
                total, count = total + float(loss), count + trained
        return total / max(1, count), count


class PromptTrainer(CheckpointingTrainer):
    """Trains a `TunedModel` on `articles`, which say the order themselves; `measure` gives the loss of held-out tokens at a step."""

    def __init__(
        self,
        tuned: TunedModel,
        articles: Sequence[Tokens],
        measure: Callable[[int], HeldOut],
        arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(
            model=tuned,
            args=arguments,
            train_dataset=list(articles),
            eval_dataset=[],  # `measure` has its own
            data_collator=collate,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self._measure = measure

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """The loss of a held-out token now, which is logged too."""
        measured = self._measure(self.state.global_step)
        metrics = {"eval_loss": measured.loss, "eval_perplexity": measured.perplexity}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Keeping(TrainerCallback):
    """Writes the record as training goes on, and the prompt with every checkpoint."""

    def __init__(self, tuned: TunedModel, record: RunRecord, save: Callable[[], None]) -> None:
        self._tuned, self._record, self._save = tuned, record, save
        self._since, self._rows = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since, self._rows = time.monotonic(), self._tuned.rows

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _ = self._tuned.prompt  # raises when it is not finite, before anything of it is saved

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        now, rows = time.monotonic(), self._tuned.rows
        if "loss" in logs:
            seconds, tokens = now - self._since, rows - self._rows
            self._record.point(
                step=state.global_step, loss=logs["loss"], learning_rate=logs["learning_rate"], seconds=round(seconds, 4), tokens=tokens
            )
        self._since, self._rows = now, rows

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save()
        self._since = time.monotonic()
