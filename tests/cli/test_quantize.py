"""`corolla quantize` as people run it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuning.finetuning import make_directory
from typer.testing import CliRunner


@pytest.fixture
def run() -> Callable[..., Any]:
    from corolla.cli.main import app

    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("models") / "base", "llama")


def test_a_model_is_quantized_and_answers(run: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    done = run("quantize", base, "--to", "nf4", "--output", tmp_path / "q")
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "q"))
    assert done.stderr.endswith("MB of tensors\n")
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    answers = [
        run("generate", tmp_path / "q", "--prompt", "hello", "--max-new-tokens", 5, "--dtype", "float32", *more)
        for more in ((), ("--quant", "nf4"))
    ]
    assert [answer.exit_code for answer in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout == answers[1].stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quantize", "{q}", "--to", "int8", "--output", "{new}"), "error: to: .* is quantized as int4 already"),
        (("generate", "{q}", "--prompt", "hello", "--quant", "nf4"), "error: weights: .* is quantized as int4 already"),
        (("quantize", "{model}", "--to", "int8", "--output", "{q}"), "error: .* is not empty: name a new directory"),
        (("quantize", "{model}/none", "--to", "int8", "--output", "{new}"), "error: "),
        (("quantize", "{model}", "--to", "int2", "--output", "{new}"), "Invalid value for '--to'"),
    ],
)
def test_a_mistake_is_one_sentence(run: Callable[..., Any], arguments: tuple[str, ...], said: str, base: Path, tmp_path: Path) -> None:
    assert run("quantize", base, "--to", "int4", "--output", tmp_path / "q").exit_code == 0
    result = run(*(argument.format(q=tmp_path / "q", new=tmp_path / "new", model=base) for argument in arguments))
    assert result.exit_code == 2
    assert re.search(said, result.stderr)
    assert not (tmp_path / "new").exists()
