"""JSON in a model's directory that is damaged or meant to harm: a typed error, within bounds."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from safetensors.torch import save_file

from corolla.client.tokenizer import TextTokenizer
from corolla.errors import AdapterError, CallerError, CheckpointError, PromptError, UnsupportedModel
from corolla.models.adapters import load_adapter
from corolla.models.catalog import describe
from corolla.models.checkpoint import Checkpoint, read_config
from corolla.models.families import architecture
from corolla.models.json_files import parse_json, read_json
from corolla.models.prompts import load_prompt
from tests.models import tiny

DEEP = "[" * 100_000
BAD = [DEEP, '{"a":' * 100_000, "{", "[]", "null", "\ud800".encode("utf-8", "surrogatepass"), "9" * 5000, ""]


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "model", num_hidden_layers=1)


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "{", "9" * 5000])
def test_whatever_is_wrong_with_json_is_a_value_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|Expecting|digits"):
        parse_json(text)
    write(tmp_path / "a.json", "1" * 11)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_json(tmp_path / "a.json", 10)


@pytest.mark.parametrize("content", BAD)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_models_files_are_refused(file: str, content: str | bytes, directory: Path) -> None:
    write(directory / file, content)
    if file != "config.json":
        (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")), Checkpoint(directory) as checkpoint:
        _ = checkpoint.config
    assert describe("it", directory).blocks == (None if file == "config.json" else 1)


@pytest.mark.parametrize("content", [BAD[0], BAD[1], BAD[2], BAD[3], BAD[5]])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_a_tokenizers_files_are_refused(file: str, content: str | bytes, tmp_path: Path) -> None:
    directory = toy.make_directory(tmp_path, toy.byte_level(), model_type="llama")
    write(directory / file, content)
    with pytest.raises(CheckpointError, match="damaged"):
        TextTokenizer(directory)


@pytest.mark.parametrize(
    ("load", "error"), [(load_adapter, AdapterError), (load_prompt, PromptError)], ids=["a LoRA adapter", "a soft prompt"]
)
@pytest.mark.parametrize("content", BAD)
def test_what_peft_saves_is_refused(load: Callable[..., Any], error: type[CallerError], content: str | bytes, directory: Path) -> None:
    write(directory / "adapter_config.json", content)
    with pytest.raises(error):
        load(directory, architecture(read_config(directory)))


def with_header(path: Path, header: bytes, size: int = 0) -> None:
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b'{"a":' * 100_000,
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        b'{"a":4}',
        b'{"\xff":4}',
    ],
)
def test_a_safetensors_header_is_refused(header: bytes, directory: Path) -> None:
    with_header(directory / "model.safetensors", header, 4)
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(directory)


def test_what_safetensors_itself_refuses_is_a_damaged_checkpoint(directory: Path) -> None:
    two = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    with_header(directory / "model.safetensors", two, 4)
    with Checkpoint(directory) as checkpoint, pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.tensor("b")


def test_a_header_of_a_quarter_gigabyte_is_not_read(directory: Path) -> None:
    with (directory / "model.safetensors").open("wb") as file:
        file.write((2**28).to_bytes(8, "little") + b'{"a":[')
        file.truncate(8 + 2**28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="has a header of 268435456 bytes"):
        Checkpoint(directory)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_a_tensor_that_looks_sound_is_read(directory: Path) -> None:
    save_file(
        {"a": torch.arange(3.0), "empty": torch.zeros(0, 4), "one": torch.tensor(1, dtype=torch.int8)}, directory / "model.safetensors"
    )
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.tensor("a").tolist() == [0, 1, 2]
        assert (checkpoint.shape("empty"), checkpoint.nbytes("one")) == ((0, 4), 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": True},
        {"hidden_size": 0},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 0},
        {"vocab_size": 1e6},
        {"intermediate_size": -4},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"hidden_act": ["silu"]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "many"}},
        {"rope_parameters": []},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"head_dim": {}},
    ],
    ids=str,
)
def test_numbers_that_make_no_model_are_refused(changes: dict[str, Any], directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((CheckpointError, UnsupportedModel)):
        architecture(read_config(directory))


@pytest.mark.parametrize("eos", ["2", 2.0, [[2]], [None], -1, True, {"a": 1}])
def test_an_end_token_that_is_no_id_is_refused(eos: Any, tmp_path: Path) -> None:
    directory = toy.make_directory(tmp_path, toy.byte_level(), model_type="llama")
    write(directory / "generation_config.json", json.dumps({"eos_token_id": eos}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        _ = TextTokenizer(directory).end_ids
