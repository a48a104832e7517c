"""The command: what it prints, what it shows of prepared data, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data.prepared import pairs, tokenizer
from typer.testing import CliRunner, Result

from corolla.cli.main import app
from corolla.data.prepare import PrepareSettings


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    root = tmp_path_factory.mktemp("prepared")
    source, model = pairs(root / "chats.jsonl", 50), tokenizer(root)
    source.write_text(source.read_text() + "{broken\n")
    options = ["--tokenizer", str(model), "--max-length", "128", "--workers", "1", "--dev", "0.1", "--plot"]
    return root / "out", CliRunner().invoke(app, ["prepare", str(source), "--output", str(root / "out"), *options])


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["prepare", *map(str, arguments)])
    assert result.exit_code == 2
    return result.stderr


def test_what_came_out(prepared: tuple[Path, Result]) -> None:
    output, result = prepared
    assert result.exit_code == 0, result.output
    assert "utilization" in result.stdout
    assert "left out: 1 lines with problems" in result.stdout
    assert "chats.jsonl:51: is no JSON" in result.stderr
    assert f"{output} is ready" in result.stdout.replace("\n", "")
    assert {path.name for path in output.iterdir()} >= {"train_1_of_1.hdf5", "metadata.yaml", "SHA256SUMS", "metrics.json"}


def test_sequences_with_what_is_trained_on(prepared: tuple[Path, Result]) -> None:
    result = CliRunner().invoke(app, ["prepare", "--inspect", str(prepared[0]), "--count", "1"])
    assert result.exit_code == 0, result.output
    assert "tokens are trained on" in result.stdout
    assert "<human>: What is" in result.stdout
    assert "⟦ It is" in result.stdout
    assert "</s>⟧" in result.stdout


def test_sequences_in_colour(prepared: tuple[Path, Result]) -> None:
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": None}
    result = CliRunner().invoke(app, ["prepare", "--inspect", str(prepared[0]), "--count", "1"], env=terminal)
    assert "\x1b[32m It is" in result.stdout
    assert "\x1b[1;32m</s>" in result.stdout
    assert "⟦" not in result.stdout


def test_pictures(prepared: tuple[Path, Result]) -> None:
    for name in ("lengths.png", "utilization.png"):
        assert (prepared[0] / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_refused(tmp_path: Path, prepared: tuple[Path, Result]) -> None:
    output, _ = prepared
    assert "give INPUT... and --output DIR, or --inspect DIR" in refused()
    assert "it looks at prepared data, and prepares none" in refused("x.jsonl", "--inspect", output)
    assert "nothing.jsonl does not exist" in refused(
        tmp_path / "nothing.jsonl", "--output", tmp_path / "x", "--tokenizer", output / "tokenizer"
    )
    assert not (tmp_path / "x").exists()
    (tmp_path / "numbers.json").write_text('{"a": "b"}')
    model = ("--tokenizer", output / "tokenizer", "--output", tmp_path / "x")
    assert "no JSON object of numbers" in refused("x.jsonl", *model, "--categories", tmp_path / "numbers.json")
    assert "template: there is no 'x'" in refused("x.jsonl", *model, "--template", "x")
    with (output / "train_1_of_1.hdf5").open("ab") as file:
        file.write(b"x")
    assert "is not the file that was written (its SHA-256 differs)" in refused("--inspect", output)


def test_the_defaults_are_the_librarys() -> None:
    import inspect

    from corolla.cli.prepare import prepare

    ours = inspect.signature(prepare).parameters
    for name in ("template", "max_length", "packing", "seed", "shuffle", "dev", "test", "duplicates", "similarity", "split"):
        assert ours[name].default == PrepareSettings.__dataclass_fields__[name].default


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, corolla.cli.prepare; assert not {'torch', 'transformers', 'h5py', 'datasketch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
