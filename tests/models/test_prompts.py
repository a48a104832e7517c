"""Soft prompts in files: to and fro between us and PEFT, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from corolla.errors import PromptError, StorageError
from corolla.models.checkpoint import Checkpoint
from corolla.models.config import ModelConfig
from corolla.models.families import architecture
from corolla.models.peft_files import CONFIG, WEIGHTS
from corolla.models.prompts import DEEP, SoftPrompt, load_prompt, load_score, save_prompt
from tests.models import tiny

IDS = torch.tensor([[5, 16, 27, 38]])

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by its old name


@pytest.fixture(scope="module", params=["llama", "bloom"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param))


def arch_of(directory: Path) -> ModelConfig:
    with Checkpoint(directory) as checkpoint:
        return architecture(checkpoint.config)


def prompt(*, deep: bool = False) -> SoftPrompt:
    torch.manual_seed(1)
    return SoftPrompt(torch.randn(3, 64), torch.randn(4, 3, 64) if deep else None)


def stock(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def logits_with(model: Any, soft: torch.Tensor) -> torch.Tensor:
    embeddings = torch.cat([soft[None], model.get_input_embeddings()(IDS)], 1)
    logits: torch.Tensor = model(inputs_embeds=embeddings).logits
    return logits


@torch.no_grad()
def test_peft_loads_what_was_saved_here(model: Path, tmp_path: Path) -> None:
    mine = prompt()
    save_prompt(tmp_path, mine, arch_of(model), base_model=str(model))
    theirs = PeftModel.from_pretrained(stock(model), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, logits_with(stock(model), mine.input), rtol=0, atol=0)


@torch.no_grad()
def test_what_peft_saved_loads_here(model: Path, tmp_path: Path) -> None:
    theirs = get_peft_model(stock(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    theirs.save_pretrained(str(tmp_path))
    mine = load_prompt(tmp_path, arch_of(model))
    assert mine.deep is None
    torch.testing.assert_close(logits_with(stock(model), mine.input), theirs(IDS).logits, rtol=0, atol=0)
    ours, written = tmp_path / "ours", json.loads((tmp_path / CONFIG).read_text())
    save_prompt(ours, mine, arch_of(model), base_model=str(model))
    del written["peft_version"]
    assert json.loads((ours / CONFIG).read_text()) == written


@torch.no_grad()
def test_a_classifiers_head_goes_both_ways(model: Path, tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(2)
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).eval()

    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs: Any = get_peft_model(classifier(), config).eval()
    theirs.base_model.score.weight.normal_()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    score = load_score(tmp_path / "theirs", arch_of(model))
    assert score is not None
    save_prompt(tmp_path / "ours", load_prompt(tmp_path / "theirs", arch_of(model)), arch_of(model), score=score)
    again = PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, rtol=0, atol=0)


def test_deep_prompts_come_back(model: Path, tmp_path: Path) -> None:
    mine = prompt(deep=True)
    save_prompt(tmp_path, mine, arch_of(model))
    back = load_prompt(tmp_path, arch_of(model))
    assert back.digest == mine.digest
    assert back.deep is not None
    assert mine.deep is not None
    assert torch.equal(back.deep, mine.deep)
    assert load_score(tmp_path, arch_of(model)) is None
    save_prompt(tmp_path, prompt(), arch_of(model))
    assert load_prompt(tmp_path, arch_of(model)).deep is None


def test_digests_name_the_content() -> None:
    digests = {prompt().digest, prompt(deep=True).digest, SoftPrompt(prompt().input.view(6, 32)).digest}
    assert len(digests) == 3
    assert prompt().digest == prompt().digest
    assert len(prompt().digest) == 64


@pytest.mark.parametrize(
    ("soft", "deep", "problem"),
    [
        (torch.full((3, 64), float("nan")), None, "NaN"),
        (torch.full((3, 64), float("inf")), None, "infinite"),
        (torch.zeros(3, 64), torch.full((4, 3, 64), float("inf")), "deep prompt has values"),
        (torch.zeros(3), None, "shape"),
        (torch.zeros(0, 64), None, "none of them 0"),
        (torch.zeros(3, 64).double(), None, "float32"),
        (torch.zeros(3, 64), torch.zeros(4, 2, 64), r"\[blocks, 3, 64\]"),
    ],
)
def test_rows_that_are_no_prompt(soft: torch.Tensor, deep: torch.Tensor | None, problem: str) -> None:
    with pytest.raises(PromptError, match=problem):
        SoftPrompt(soft, deep)


def change(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **changes}))


def replace(directory: Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / file)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda d: (d / CONFIG).unlink(), f"{CONFIG} is missing"),
        (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda d: shutil.rmtree(d), "is missing"),
        (lambda d: cut(d / CONFIG), "cannot be read"),
        (lambda d: cut(d / WEIGHTS), "cut short"),
        (lambda d: cut(d / DEEP), "cut short"),
        (lambda d: change(d, peft_type="LORA"), "LORA"),
        (lambda d: change(d, num_transformer_submodules=2), "encoder"),
        (lambda d: change(d, num_virtual_tokens=5), "where adapter_config.json says"),
        (lambda d: replace(d, WEIGHTS, {"other": torch.zeros(3, 64)}), "no tensor prompt_embeddings"),
        (lambda d: replace(d, WEIGHTS, {"prompt_embeddings": torch.full((3, 64), float("nan"))}), "NaN"),
        (lambda d: replace(d, WEIGHTS, {"prompt_embeddings": torch.zeros(3, 64)}), "not of one prompt"),
        (lambda d: replace(d, DEEP, {"prompts": torch.zeros(5, 3, 64)}), "5 blocks"),
        (lambda d: replace(d, DEEP, {"other": torch.zeros(4, 3, 64)}), "no tensor prompts"),
    ],
)
def test_files_that_do_not_hold(tmp_path: Path, model: Path, harm: Any, problem: str) -> None:
    directory = tmp_path / "prompt"
    save_prompt(directory, prompt(deep=True), arch_of(model))
    harm(directory)
    with pytest.raises(PromptError, match=problem):
        load_prompt(directory, arch_of(model))


def test_another_model(tmp_path: Path) -> None:
    arch, other = (arch_of(tiny.save(name, tmp_path / name)) for name in ("llama", "bloom"))
    save_prompt(tmp_path / "p", prompt(), arch)
    with pytest.raises(PromptError, match="its family is 'llama', this one's 'bloom'"):
        load_prompt(tmp_path / "p", other)
    replace(tmp_path / "p", WEIGHTS, load_file(tmp_path / "p" / WEIGHTS))  # as PEFT saves it, of an unknown model
    assert load_prompt(tmp_path / "p", other).digest == prompt().digest
    with pytest.raises(PromptError, match="96"):
        load_prompt(tmp_path / "p", arch_of(tiny.save("bloom-6-heads", tmp_path / "wide")))
    with pytest.raises(PromptError, match="another model"):
        save_prompt(tmp_path / "q", SoftPrompt(torch.zeros(3, 32)), arch)
    assert not (tmp_path / "q").exists()


def test_a_disk_that_refuses(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save_prompt(tmp_path / "file" / "p", prompt(), arch_of(model))
