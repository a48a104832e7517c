"""`corolla init` and `corolla finetune` as people run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tuning.finetuning import dialogues
from typer.testing import CliRunner

SMALL = ("--set", "max_length=64", "--set", "dtype=float32", "--set", "held_out=0.2", "--device", "cpu")


@pytest.fixture
def run() -> Callable[..., Any]:
    from corolla.cli.main import app

    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_from_nothing_to_a_model(run: Callable[..., Any], tmp_path: Path) -> None:
    data = dialogues(tmp_path / "dialogues.jsonl")
    shape = ("--hidden", 32, "--layers", 1, "--vocabulary", 300, "--context", 128)
    made = run("init", "--tokenizer-from", data, "--output", tmp_path / "base", *shape)
    assert (made.exit_code, "bloom of" in made.stdout) == (0, True), made.stderr
    arguments = ("--data", data, "--output", tmp_path / "chat", "--recipe", "tiny-chat", "--report-to", "tensorboard", *SMALL)
    tuned = run("finetune", tmp_path / "base", *arguments)
    assert tuned.exit_code == 0, tuned.stderr
    assert "held-out loss" in tuned.stdout
    assert f"corolla chat {tmp_path / 'chat'}" in tuned.stdout
    assert json.loads((tmp_path / "chat" / "finetuning.json").read_text())["status"] == "done"
    assert {file.parts[-3] for file in (tmp_path / "chat" / "runs").rglob("events*")} == {"phase-1", "phase-2"}
    again = run("finetune", tmp_path / "base", "--data", data, "--output", tmp_path / "chat", *SMALL)
    assert (again.exit_code, "holds a run already" in again.stderr) == (2, True)


def test_a_recipe_is_shown_whole(run: Callable[..., Any]) -> None:
    shown = run("finetune", "--show-recipe", "sft-chat")
    assert shown.exit_code == 0
    assert yaml.safe_load(shown.stdout)["label_smoothing"] == 0.05


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "cake"), "recipe: there is no 'cake'"),
        (("--set", "speed=3"), "speed: a recipe has no such setting"),
        (("--report-to", "carrier-pigeon"), "report-to: there is no 'carrier-pigeon'"),
        (("--micro-batch", "7"), "micro-batch: 7 sequences on each of 1 devices do not divide"),
        (("--data", "9=x.jsonl"), "data: '9=x.jsonl'"),
    ],
)
def test_a_mistake_is_one_line(run: Callable[..., Any], arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    data = dialogues(tmp_path / "dialogues.jsonl", 5)
    run("init", "--tokenizer-from", data, "--output", tmp_path / "base", "--hidden", 32, "--layers", 1, "--context", 1024)
    result = run("finetune", tmp_path / "base", "--data", data, "--output", tmp_path / "out", "--set", "held_out=0", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: {said}")
