"""Each example runs, on a tiny model, and does what it is for."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import toy

from corolla import AutoDistributedModelForCausalLM
from tests.models import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", params=["llama", "bloom"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer."""
    directory = toy.make_directory(tmp_path_factory.mktemp(request.param), toy.byte_level(), model_type=request.param)
    return tiny.save(request.param, directory, vocab_size=400)


def run(name: str, *arguments: Any) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"]([str(argument) for argument in arguments])


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_the_personachat_chatbot(model: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prompt"
    tuning = ["--tuning-mode", mode, "--soft-tokens", 4, "--steps", 5, "--max-length", 48]
    run("prompt_tuning_personachat.py", "--model", model, *tuning, "--output", out, "--say", "hello", "what do you do ?")
    said = capsys.readouterr().out
    assert said.count("Friend:") == 2
    assert "loss of the first batch" in said
    tuned = AutoDistributedModelForCausalLM.from_pretrained(model, prompt=out)
    assert tuned.soft_prompt.input.shape == (4, 64)
    assert (tuned.soft_prompt.deep is not None) == (mode == "deep_ptune")
    tuned.close()


def test_sequence_classification(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("classification_sst2.py", "--model", model, "--epochs", 2, "--soft-tokens", 3, "--output", tmp_path)
    assert capsys.readouterr().out.count("right") == 2
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_module_between_two_spans(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("between_blocks.py", "--model", model, "--steps", 12)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("into block") for line in lines) == 4
    before, after = (float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("loss"))
    assert after < before
