"""Tiny models with tokenizers, dialogues, and runs that tune prompts on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from rich.console import Console
from transformers import TrainerCallback

from corolla.tuning.dialogues import DataSettings
from corolla.tuning.prompt_tuning import TuneSettings, tune
from corolla.tuning.run_record import RunRecord
from tests.models import tiny

Tune = Callable[..., RunRecord]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of tiny checkpoints, each with a tokenizer, by family."""
    made = {}
    for family in ("llama", "bloom"):
        directory = toy.make_directory(tmp_path_factory.mktemp(family), toy.byte_level(), model_type=family)
        made[family] = tiny.save(family, directory, vocab_size=400)
    return made


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty dialogues, each of two questions and answers, as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl"
    cities = ("Paris", "Rome", "Athens", "Oslo", "Lima", "Cairo")
    with path.open("w", encoding="utf-8") as file:
        for number in range(60):
            city, other = cities[number % 6], cities[number // 6 % 6]
            said = [f"hello {number}, where is {city}?", f"{city} is here.", f"and {other}?", f"{other} is far, {number} miles."]
            turns = [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(said)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def tuning(models: dict[str, Path], dialogues: Path, tmp_path: Path, quiet: Console) -> Tune:
    """Tunes a prompt of four tokens for a tiny model into `tmp_path / out`; six steps, unless said otherwise."""

    def run(
        out: str = "prompt",
        model: str = "llama",
        *callbacks: TrainerCallback,
        resume: bool = False,
        data: dict[str, Any] | None = None,
        **settings: Any,
    ) -> RunRecord:
        read = DataSettings(**{"data": str(dialogues), "max_length": 160, "held_out": 0.1, "held_out_samples": 3, **(data or {})})
        chosen = TuneSettings(**{"prompt_tokens": 4, "batch": 3, "steps": 6, "report_to": "none", **settings})
        return tune(str(models[model]), tmp_path / out, read, chosen, quiet, resume=resume, callbacks=callbacks)

    return run
