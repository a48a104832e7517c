"""`corolla evaluate` on a tiny model with weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from typer.testing import CliRunner

from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.data.sampling import is_held_out
from tests.data.prepared import run as prepare
from tests.data.prepared import tokenizer
from tests.models import tiny

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = toy.make_directory(tmp_path_factory.mktemp("toy"), toy.byte_level())
    directory = tiny.save("llama", tmp_path_factory.mktemp("model"), vocab_size=400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((made / name).read_bytes())
    return directory


@pytest.fixture
def run(logging_as_it_was: None) -> Run:
    from corolla.cli.main import app

    return lambda *arguments: CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_loss_answers_and_tokens_per_word(run: Run, directory: Path, tmp_path: Path) -> None:
    data, english, figures, picture = (tmp_path / name for name in ("d.jsonl", "en.txt", "figures.json", "picture.png"))
    data.write_text('{"instruction": "hello", "response": "fine"}\n' * 3)
    english.write_text("The capital of France is Paris.")
    given = ["--data", data, "--template", "plain", "--replies", 2, "--max-new-tokens", 3, "--words", f"en={english}"]
    done = run(directory, *given, "--dtype", "float32", "--json", figures, "--plot", picture)
    assert done.exit_code == 0, done.output
    found = json.loads(figures.read_text())
    assert found["loss"][str(data)]["articles"] == 3
    assert found["loss"][str(data)]["perplexity"] > 1
    assert found["answers"][str(data)]["longest"] <= 3
    assert found["tokens_per_word"][str(directory)]["en"] > 1
    assert "perplexity" in done.stdout
    assert "distinct-1" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_held_out_part_is_that_of_tune_and_finetune(run: Run, directory: Path, tmp_path: Path) -> None:
    data, figures = tmp_path / "d.jsonl", tmp_path / "figures.json"
    data.write_text("".join(json.dumps({"instruction": f"say {number}", "response": f"{number}"}) + "\n" for number in range(40)))
    expected = sum(is_held_out(example, 0.2, 0) for example in read(str(data), Problems()))
    done = run(directory, "--data", data, "--template", "plain", "--held-out", 0.2, "--dtype", "float32", "--json", figures)
    assert done.exit_code == 0, done.output
    assert json.loads(figures.read_text())["loss"][str(data)]["articles"] == expected
    assert 0 < expected < 40
    prepare(data, tmp_path / "prepared", tokenizer(tmp_path))
    refused = run(directory, "--data", tmp_path / "prepared", "--held-out", 0.2)
    assert refused.exit_code == 2
    assert "choose with --part" in refused.output


def test_a_tokenizer_needs_no_weights(run: Run, directory: Path, tmp_path: Path) -> None:
    french = tmp_path / "fr.txt"
    french.write_text("Où est la gare ?", encoding="utf-8")
    alone = toy.make_directory(tmp_path / "alone", toy.byte_level())
    done = run(alone, "--words", f"fr={french}", "--tokenizer", directory)
    assert done.exit_code == 0, done.output
    assert "fr" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to evaluate"),
        (["--words", "english.txt"], "is not LANGUAGE=FILE"),
        (["--words", "en=missing.txt"], "missing.txt cannot be read"),
        (["--replies", "3", "--words", "en=missing.txt"], "missing.txt cannot be read"),
        (["--data", "x", "--plot", "x.pdf"], "is no PNG"),
    ],
)
def test_what_cannot_be_evaluated(run: Run, directory: Path, arguments: list[str], says: str) -> None:
    done = run(directory, *arguments)
    assert done.exit_code == 2
    assert says in done.output
