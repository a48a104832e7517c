"""A small model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tuning.finetuning import dialogues

from corolla.client.tokenizer import TextTokenizer
from corolla.data.problems import Problems
from corolla.errors import DataError, InvalidSetting
from corolla.models.checkpoint import Checkpoint
from corolla.models.families import architecture
from corolla.tuning.initialize import FAMILIES, InitSettings, initialize

SHAPE: dict[str, Any] = {"hidden": 64, "layers": 2, "vocabulary": 300, "context": 128}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dialogues(tmp_path_factory.mktemp("data") / "dialogues.jsonl")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_directory_is_a_whole_model(family: str, data: Path, tmp_path: Path) -> None:
    parameters = initialize(tmp_path / "made", [str(data)], InitSettings(family=family, **SHAPE), Problems(strict=True))
    with Checkpoint(tmp_path / "made") as checkpoint:
        arch = architecture(checkpoint.config)
    assert (arch.family, arch.hidden, arch.blocks, arch.heads, arch.context_length) == (family, 64, 2, 2, 128)
    assert 64 * 300 < parameters < 200_000
    tokenizer = TextTokenizer(tmp_path / "made")
    assert tokenizer.decode(tokenizer.encode("hello, ça va? 你好")) == "hello, ça va? 你好"
    assert (tokenizer.token_id("<s>"), tokenizer.token_id("</s>"), tokenizer.end_ids) == (1, 2, (2,))


def test_the_same_seed_and_data_make_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        initialize(tmp_path / name, [str(data)], InitSettings(seed=seed, **SHAPE), Problems())
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"family": "gpt5"}, "there is no"),
        ({"heads": 3}, "do not divide"),
        ({"vocabulary": 100}, "at least 260"),
        ({"heads": 64}, "odd size"),
    ],
)
def test_a_shape_that_there_is_not(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSetting, match=said):
        InitSettings(**{**SHAPE, **setting})


def test_no_text_and_a_directory_that_is_taken(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="too little text"):
        initialize(tmp_path / "made", [str(tmp_path / "empty.txt")], InitSettings(**SHAPE), Problems())
    assert not (tmp_path / "made").exists()
    with pytest.raises(InvalidSetting, match="there already"):
        initialize(tmp_path, [str(data)], InitSettings(**SHAPE), Problems())
