"""The recipe's loss, schedule and optimizer, against values by hand and against plain PyTorch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import TrainingArguments
from tuning.finetuning import make_model, sequence

from corolla.data.tokens import IGNORED
from corolla.errors import TrainingError
from corolla.tuning.batches import Collator, Numbered, SequenceDataset, wants_mask
from corolla.tuning.finetune_trainer import FinetuneTrainer, schedule_for
from corolla.tuning.logits_loss import trained_loss
from corolla.tuning.recipe import Recipe, load_recipe

SFT_CHAT = load_recipe("sft-chat", ["dtype=float32"])
ROWS = [sequence(7, 5, padding=4, seed=1), sequence(16, seed=2), sequence(3, 3, 3, padding=7, seed=3), sequence(11, padding=5, seed=4)]


def test_label_smoothing_and_masks_by_hand() -> None:
    """Three tokens; the second column is ignored, so the first one's prediction does not count and the second's does."""
    logits = torch.tensor([[[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0], [5.0, 5.0, 9.0]]])
    labels = torch.tensor([[1, IGNORED, 0]])
    # At the second column the probabilities are 1/2, 1/4, 1/4, and the target is 0.
    assert trained_loss(logits, labels).item() == pytest.approx(math.log(2))
    by_hand = 0.95 * math.log(2) + 0.05 / 3 * (math.log(2) + 2 * math.log(4))
    assert trained_loss(logits, labels, smoothing=0.05).item() == pytest.approx(by_hand, rel=1e-6)


def test_the_one_cycle_is_torchs_and_ends_where_the_card_says() -> None:
    steps, parameter = 40, torch.nn.Parameter(torch.zeros(1))
    optimizer, reference = torch.optim.AdamW([parameter], lr=1.0), torch.optim.AdamW([parameter], lr=1.0)
    schedule = schedule_for(optimizer, SFT_CHAT, steps)
    torchs = OneCycleLR(reference, 5e-4, steps, pct_start=0.3, div_factor=100, final_div_factor=0.1, cycle_momentum=False)
    rates = []
    for _ in range(steps):
        assert schedule.get_last_lr() == torchs.get_last_lr()
        rates.append(schedule.get_last_lr()[0])
        for each in (optimizer, reference):
            each.step()
        schedule.step()
        torchs.step()
    assert (rates[0], max(rates), rates[-1]) == pytest.approx((5e-6, 5e-4, 5e-5))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_schedule_of_few_steps(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    recipe = Recipe(name="", schedule="one-cycle", warmup=0.1)
    schedule = schedule_for(optimizer, recipe, steps)
    for _ in range(steps):
        assert 0 < schedule.get_last_lr()[0] <= recipe.learning_rate
        optimizer.step()
        schedule.step()


def test_a_cosine_with_a_warmup() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = schedule_for(optimizer, Recipe(name="", learning_rate=1.0, warmup=0.5, end_ratio=0.1), 8)
    rates = []
    for _ in range(9):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[6] == pytest.approx(0.55)
    assert rates[8] == pytest.approx(0.1)


def trainer(model: Any, recipe: Recipe, directory: Path, rows: Any = ROWS, micro_batch: int = 2, **options: Any) -> FinetuneTrainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=recipe.global_batch // micro_batch,
        use_cpu=True,
        max_grad_norm=recipe.clip or 0.0,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        **{"max_steps": 1, "save_strategy": "no", "logging_steps": 1, **options},
    )
    return FinetuneTrainer(model, recipe, arguments, SequenceDataset(rows), None, Collator(2, wants_mask=wants_mask(model)))


def test_a_step_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    """Two batches of two packed sequences are one step: the loss is the mean over all trained tokens of both, smoothed."""
    recipe = Recipe(**{**_fields(SFT_CHAT), "batch": 2, "accumulation": 2, "weight_decay": 0.1})
    model = make_model("bloom")
    plain = copy.deepcopy(model)
    trainer(model, recipe, tmp_path).train()

    matrices = [parameter for parameter in plain.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in plain.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=5e-4,
        betas=(0.9, 0.999),
        amsgrad=True,
    )
    OneCycleLR(optimizer, 5e-4, 2, pct_start=0.3, div_factor=100, final_div_factor=0.1, cycle_momentum=False)
    plain.train()
    losses = []
    for row in ROWS:
        for article in range(int(row.segments.max()) + 1):
            ids = torch.from_numpy(row.input_ids[row.segments == article]).long()[None]
            logits = plain(input_ids=ids, use_cache=False).logits[0, :-1]  # the first token of an article is a question's
            log_probabilities = logits.log_softmax(-1)
            likelihood = log_probabilities.gather(-1, ids[0, 1:, None])[:, 0]
            losses.append(-0.95 * likelihood - 0.05 * log_probabilities.mean(-1))
    torch.cat(losses).mean().backward()
    optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)


def test_how_a_step_is_divided_changes_nothing_but_rounding(tmp_path: Path) -> None:
    models = [make_model("llama"), make_model("llama")]
    recipe = Recipe(name="", batch=2, accumulation=2, dtype="float32", learning_rate=1e-3)
    for number, (model, micro_batch) in enumerate(zip(models, (1, 4), strict=True)):
        trainer(model, recipe, tmp_path / str(number), micro_batch=micro_batch).train()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


class _Breaking(torch.nn.Module):
    """A model that computes NaN, in the forward or in the gradients, for a batch with a certain token."""

    def __init__(self, model: Any, token: int, *, backward: bool) -> None:
        super().__init__()
        self.model, self.config, self.token, self.backward = model, model.config, token, backward

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        outputs = self.model(input_ids=input_ids, **inputs)
        if (input_ids == self.token).any():
            if self.backward:
                outputs.logits.register_hook(lambda gradient: gradient * math.nan)
            else:
                outputs.logits = outputs.logits * math.nan
        return outputs


@pytest.mark.parametrize(
    ("backward", "said"), [(False, "the loss is not finite in step 2, batch 1 of 1"), (True, "a gradient is not finite in step 2")]
)
def test_nan_stops_with_step_and_batch_before_the_weights_change(backward: bool, said: str, tmp_path: Path) -> None:
    rows = [sequence(8, seed=number) for number in range(4)]
    model = make_model("bloom")
    order: list[int] = []
    recipe = Recipe(name="", batch=1, dtype="float32")
    watched = trainer(_Breaking(model, -1, backward=False), recipe, tmp_path, rows, 1, max_steps=2)
    watched.data_collator = lambda batch: (order.extend(entry.number for entry in batch), Collator(2)(batch))[1]
    watched.train()  # to learn the order
    second = int(rows[order[1]].input_ids[0])

    breaking = _Breaking(make_model("bloom"), second, backward=backward)
    before = trainer(breaking, recipe, tmp_path / "b", rows, 1, max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingError, match=rf"{said}.*sequences {order[1]}\).*last checkpoint is kept"):
        before.train()
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(torch.isfinite(parameter).all() for parameter in breaking.parameters())


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}


def test_held_out_loss_is_the_mean_over_trained_tokens_without_smoothing(tmp_path: Path) -> None:
    model = make_model("bloom")
    collator = Collator(2, wants_mask=wants_mask(model))
    evaluating = trainer(model, SFT_CHAT, tmp_path, micro_batch=1)
    evaluating.eval_dataset = SequenceDataset(ROWS)
    found = evaluating.held_out_loss()
    total, tokens = 0.0, 0
    for row in ROWS:
        batch = collator([Numbered(0, row)])
        labels = batch.pop("labels")
        batch.pop("sequences")
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        tokens += int((labels != IGNORED).sum())
    assert (found.tokens, found.loss) == (tokens, pytest.approx(total / tokens, rel=1e-5))
