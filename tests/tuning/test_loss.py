"""The loss, its gradients and what training makes of a prompt, against PEFT's own prompt tuning in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, get_scheduler

from corolla.chat.templates import TEMPLATES
from corolla.data.problems import Problems
from corolla.data.tokens import Tokens, TrainingTokenizer
from corolla.models.config import ModelConfig
from corolla.models.families import architecture
from corolla.models.prompts import load_prompt
from corolla.remote.models import AutoDistributedConfig, AutoDistributedModelForCausalLM
from corolla.remote.prompts import soft_prompts
from corolla.tuning.dialogues import DataSettings, collate, in_order, load_dialogues
from corolla.tuning.loss import summed_cross_entropy, summed_loss
from tests.tuning.conftest import Tune

# PEFT asks transformers' models by a name that they will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

P = 4


def articles_of(directory: Path, dialogues: Path, loss: Any) -> list[Tokens]:
    settings = DataSettings(data=str(dialogues), max_length=160, held_out=0.1, loss=loss)
    return load_dialogues(settings, TrainingTokenizer(directory), TEMPLATES["plain"], Problems(strict=True)).training.articles


def peft_model(directory: Path, first: torch.Tensor) -> Any:
    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = get_peft_model(stock, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(first)))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(first)
    return model


def first_prompt(directory: Path, seed: int = 0) -> torch.Tensor:
    embedding = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).get_input_embeddings().weight
    torch.manual_seed(seed)
    return soft_prompts("ptune", P, embedding, 4).tokens.detach()


def arch(directory: Path) -> ModelConfig:
    return architecture(AutoDistributedConfig.from_pretrained(directory))


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("loss", ["answers", "all"])
def test_loss_and_gradient_are_pefts(models: dict[str, Path], dialogues: Path, family: str, loss: str) -> None:
    directory = models[family]
    batch = collate(articles_of(directory, dialogues, loss)[:3])
    theirs = peft_model(directory, first_prompt(directory))
    expected = theirs(**batch).loss
    expected.backward()
    torch.manual_seed(0)
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32", tuning_mode="ptune", pre_seq_len=P)
    total, count = summed_loss(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    (total / count).backward()
    model.close()
    assert count == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=1e-5)
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(model.bare.prompts.tokens.grad, gradient, rtol=1e-5, atol=1e-5)


def test_without_a_prompt_it_is_the_stock_models(models: dict[str, Path], dialogues: Path) -> None:
    batch = collate(articles_of(models["llama"], dialogues, "all")[:3])
    expected = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)(**batch).loss
    model = AutoDistributedModelForCausalLM.from_pretrained(models["llama"], torch_dtype="float32")
    with torch.no_grad():
        total, count = summed_loss(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    model.close()
    assert count == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_steps_and_their_prompt_are_pefts(models: dict[str, Path], dialogues: Path, tmp_path: Path, tuning: Tune, family: str) -> None:
    """The same data, seed, first prompt, optimizer and steps, in a plain loop over PEFT's model."""
    directory, steps, batch = models[family], 6, 3
    record = tuning(model=family, data={"loss": "all"}, template="plain")
    model = peft_model(directory, first_prompt(directory))
    optimizer = torch.optim.AdamW(model.prompt_encoder.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    order = in_order(articles_of(directory, dialogues, "all"), steps, batch, 0)
    losses = []
    for begin in range(0, len(order), batch):
        loss = model(**collate(order[begin : begin + batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.prompt_encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [entry["loss"] for entry in record.curve] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    ours = load_prompt(tmp_path / "prompt", arch(directory))
    theirs = model.prompt_encoder["default"].embedding.weight.detach()
    torch.testing.assert_close(ours.input, theirs, rtol=1e-5, atol=1e-5)
    assert record.prompt["digest"] == ours.digest


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_in_pieces_it_is_torchs_cross_entropy(at_once: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    linear, labels, rows = torch.nn.Linear(16, 50), torch.randint(50, (7,)), torch.randn(7, 16)
    linear.weight.data[3] *= 1e4  # logits that would overflow as powers

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = linear(rows)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    loss = summed_cross_entropy(ours, labels, head, at_once)
    expected = torch.nn.functional.cross_entropy(head(theirs), labels, reduction="sum")
    (loss * 2).backward()
    (expected * 2).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert summed_cross_entropy(rows[:0], labels[:0], head, at_once) == 0
