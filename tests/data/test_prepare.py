"""Inputs as a directory of packed sequences: the same bytes always, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from data.prepared import contents, pairs, run, tokenizer

from corolla.data.dataset import PackedDataset
from corolla.data.layout import UNFINISHED
from corolla.data.packing import Packing
from corolla.data.prepare import PrepareSettings
from corolla.data.problems import Problems
from corolla.data.render import RenderSettings
from corolla.data.saving import check_sums, sha256
from corolla.data.tokens import TrainingTokenizer
from corolla.errors import CallerError, DataError, InvalidSetting

COUNT = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("source") / "chats.jsonl", COUNT)


def articles(directory: Path, model: Path, part: str = "train") -> list[str]:
    with PackedDataset(directory, part) as dataset:  # type: ignore[arg-type]
        return [TrainingTokenizer(model).decode(article.input_ids.tolist()) for article in dataset.articles()]


@pytest.mark.parametrize("packing", ["full", "greedy", "single"])
@pytest.mark.parametrize("files", [1, 3])
def test_every_article_comes_out_once(tmp_path: Path, source: Path, model: Path, packing: Packing, files: int) -> None:
    metrics = run(source, tmp_path / "out", model, packing=packing, files={"train": files})
    found = articles(tmp_path / "out", model)
    assert sorted(found) == sorted(
        f"<human>: What is {number}?\n<bot>: {' '.join([f'It is {number}.'] * (1 + number % 4))}\n" for number in range(COUNT)
    )
    assert metrics["parts"]["train"]["articles"] == COUNT


def test_without_shuffling_the_order_is_the_inputs(tmp_path: Path, source: Path, model: Path) -> None:
    run(source, tmp_path / "out", model, shuffle=False, files={"train": 2})
    found = articles(tmp_path / "out", model)
    assert found == sorted(found, key=lambda text: int(text.split("What is ")[1].split("?")[0]))


def test_metadata_and_sums(tmp_path: Path, source: Path, model: Path) -> None:
    metrics = run(source, tmp_path / "out", model, dev=0.1, test=0.1, seed=3, files={"train": 2})
    check_sums(tmp_path / "out")
    said = yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())
    assert (said["max_seq_length"], said["seed"], said["vocab_size"]) == (128, 3, TrainingTokenizer(model).vocabulary)
    assert said["sources"] == [{"name": "chats.jsonl", "bytes": source.stat().st_size, "sha256": sha256(source)}]
    assert said["tokenizer_model_type"] == "<class 'transformers.models.bloom.configuration_bloom.BloomConfig'>"
    parts = metrics["parts"]
    assert sum(part["articles"] for part in parts.values()) == COUNT
    assert all(10 < parts[part]["articles"] < 60 for part in ("dev", "test"))
    for part in parts.values():
        tokens = part["prompt_tokens"] + part["completion_tokens"]
        assert tokens + part["padding_tokens"] == part["sequences"] * 128
        assert (tokens, part["utilization"]) == (part["rendered_tokens"], pytest.approx(tokens / part["sequences"] / 128, abs=1e-5))


def test_the_files_are_those_of_bloomchats_tools(tmp_path: Path, source: Path, model: Path) -> None:
    run(source, tmp_path / "out", model, dev=0.2, test=0.2, categories="auto", files={"train": 3, "dev": 2})
    files = sorted(path.name for path in (tmp_path / "out").glob("*.hdf5"))
    assert files == ["dev_1_of_2.hdf5", "dev_2_of_2.hdf5", "test.hdf5", *(f"train_{number}_of_3.hdf5" for number in (1, 2, 3))]
    rows = []
    for name in files:
        with h5py.File(tmp_path / "out" / name) as file:
            assert set(file) == {"input_ids", "token_type_ids", "category_ids"}
            for field in file.values():
                assert (field.dtype, field.compression, field.shape[1]) == (np.int32, "gzip", 128)
            assert set(np.unique(file["token_type_ids"])) <= {0, 1, 2, 3}
            assert set(np.unique(file["category_ids"])) <= {-1, 0, 1, 2}
            rows.append(len(file["input_ids"]))
    assert max(rows[3:]) - min(rows[3:]) <= 1
    said = yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())
    assert said["categories"] == {"kind 0": 0, "kind 1": 1, "kind 2": 2}
    assert (said["number_of_training_files"], said["max_batch_size_train"]) == (3, min(rows[3:]))


def test_what_bloomchats_tools_ask_of_the_metadata_is_there_without_held_out_data(tmp_path: Path, source: Path, model: Path) -> None:
    run(source, tmp_path / "out", model, files={"train": 2})
    said = yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())
    assert said["token_type_ids"] is True
    assert [said[f"number_of_{part}_files"] for part in ("training", "dev", "test")] == [2, 0, 0]
    assert (said["max_batch_size_train"] > 0, said["max_batch_size_dev"]) == (True, None)


def test_categories_by_a_mapping(tmp_path: Path, source: Path, model: Path) -> None:
    run(source, tmp_path / "out", model, categories={"kind 1": 7}, packing="single")
    with h5py.File(tmp_path / "out" / "train_1_of_1.hdf5") as file:
        firsts = file["category_ids"][:, 0].tolist()
    assert (firsts.count(7), firsts.count(-1)) == (COUNT // 3, COUNT - COUNT // 3)


def test_filters_and_what_they_leave_out(tmp_path: Path, source: Path, model: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_text(source.read_text() * 2)
    metrics = run(twice, tmp_path / "out", model, duplicates="exact", render=RenderSettings(shortest=32, longest=45))
    left_out, kept = metrics["left_out"], metrics["parts"]["train"]["articles"]
    assert left_out["duplicate_examples"] == COUNT
    assert left_out["too_short_articles"] > 0
    assert left_out["too_long_articles"] > 0
    assert kept + left_out["too_short_articles"] + left_out["too_long_articles"] == COUNT


def test_sequences_that_are_all_prompt(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"prompt": "a b c " * 200, "completion": "d"}) + "\n")
    dropped = run(source, tmp_path / "a", model, packing="full")
    kept = run(source, tmp_path / "b", model, packing="full", keep_prompt_only=True)
    assert dropped["left_out"]["prompt_only_sequences"] == kept["parts"]["train"]["sequences"] - 1
    with pytest.raises(DataError, match="there is nothing to train on"):
        run(source, tmp_path / "c", model, packing="greedy")
    assert run(source, tmp_path / "d", model, packing="greedy", keep_prompt_only=True)["parts"]["train"]["sequences"] == 1


def test_bad_lines_are_named_and_counted(tmp_path: Path, model: Path) -> None:
    source = pairs(tmp_path / "x.jsonl", 20)
    source.write_text(source.read_text() + '{"messages": [\n{"neither": 1}\n')
    told: list[str] = []
    metrics = run(source, tmp_path / "out", model, problems=Problems(tell=told.append))
    assert metrics["left_out"]["lines_with_problems"] == 2
    assert told[0].startswith(f"{source}:21: is no JSON")
    assert told[1] == f'{source}:22: needs "messages" (or "conversations") as a list with at least one'
    with pytest.raises(DataError, match=r"x.jsonl:21: is no JSON"):
        run(source, tmp_path / "strict", model, problems=Problems(strict=True))
    assert not (tmp_path / "strict" / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "nothing to train on"), ('{"neither": 1}\n', "has no record of a format that is known"), ("{}", "has no record")],
)
def test_inputs_without_anything(tmp_path: Path, model: Path, content: str, problem: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=problem):
        run(tmp_path / "x.jsonl", tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_token(tmp_path: Path, source: Path, model: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    with pytest.raises(CallerError, match="bare has no end token: name one as eos_token"):
        run(source, tmp_path / "out", bare)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_taken(tmp_path: Path, source: Path, model: Path) -> None:
    run(source, tmp_path / "out", model)
    with pytest.raises(DataError, match="out holds prepared data already"):
        run(source, tmp_path / "out", model)
    with pytest.raises(DataError, match="is not an empty directory"):
        run(source, model, model)


def test_more_files_than_sequences_and_on_with_fewer(tmp_path: Path, source: Path, model: Path) -> None:
    with pytest.raises(InvalidSetting, match="train-files: 250 are more than the"):
        run(source, tmp_path / "out", model, files={"train": 250})
    chunk = next((tmp_path / "out" / UNFINISHED / "articles").iterdir())
    made = chunk.stat().st_mtime_ns
    with pytest.raises(DataError, match="was begun with other seed: say the same again to go on, or delete it"):
        run(source, tmp_path / "out", model, seed=1)
    assert chunk.stat().st_mtime_ns == made
    run(source, tmp_path / "out", model)
    run(source, tmp_path / "direct", model)
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")


@pytest.mark.parametrize("option", [{"dev": 1.0}, {"dev": 0.6, "test": 0.6}, {"workers": 0}, {"seed": -1}, {"files": {"train": 0}}])
def test_bad_settings(model: Path, option: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting):
        PrepareSettings(inputs=("x",), tokenizer=model, **option)
