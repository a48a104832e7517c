import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from corolla.cli.models import models
from corolla.cli.progress import showing_progress
from corolla.errors import ModelNotFound

app = typer.Typer()
app.command()(models)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def put_smollm2(cache: Path) -> Path:
    directory = cache / "models" / "smollm2"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 30, "dtype": "bfloat16"}')
    return directory


def test_an_empty_cache_shows_what_can_be_fetched() -> None:
    output = CliRunner().invoke(app, []).output
    assert "smollm2" in output
    assert "not fetched yet" in output


def test_a_model_in_the_cache_is_described(cache: Path) -> None:
    put_smollm2(cache)
    output = CliRunner().invoke(app, []).output
    assert "not fetched" not in output
    for word in ("smollm2", "llama", "30", "bfloat16"):
        assert word in output


def test_json_has_both(cache: Path) -> None:
    (missing,) = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert (missing["name"], missing["fetched"]) == ("smollm2", False)
    directory = put_smollm2(cache)
    (found,) = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert (found["directory"], found["fetched"], found["blocks"]) == (str(directory), True, 30)


def test_fetch_of_an_unknown_name_is_an_error() -> None:
    assert isinstance(CliRunner().invoke(app, ["--fetch", "nothing"]).exception, ModelNotFound)


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_progress_of_fetching_shows_stages_of_known_and_unknown_size(
    terminal: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    with showing_progress() as progress:
        progress("downloading", 0, 10)
        progress("downloading", 10, 10)
        progress("converting", 0, None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "converting" in captured.err
    if terminal == "0":
        assert captured.err.splitlines() == ["downloading ...", "converting ..."]


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_progress_of_fetching_nothing_shows_nothing(
    terminal: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    with showing_progress():
        pass
    assert capsys.readouterr() == ("", "")
