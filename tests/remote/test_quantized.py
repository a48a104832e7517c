"""Quantized directories through the PyTorch client: embeddings and heads are read as values, not as codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from corolla.errors import CheckpointError
from corolla.models.quantization import quantize_model
from corolla.models.quantized_files import tensors_of
from corolla.models.quantized_tensor import QuantizedFormat, quantize
from corolla.models.span import load_span
from corolla.remote.models import AutoDistributedModelForCausalLM
from tests.models import tiny
from tests.remote.conftest import MakeSwarm
from tests.remote.stock import IDS, stock

FORMATS: tuple[QuantizedFormat, ...] = ("int8", "int4", "nf4")
ERROR = {"int8": 0.01, "int4": 0.15, "nf4": 0.2}  # of these tiny models' loss, in nats


@pytest.fixture(scope="module", params=["llama", "llama-tied", "bloom"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {} if request.param == "bloom" else {"intermediate_size": 128}
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param), **changes)


def loss(model: Any) -> float:
    with torch.no_grad():
        return float(model(IDS[:1], labels=IDS[:1]).loss)


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_directory_has_nearly_the_models_loss_here_and_at_servers(
    format: QuantizedFormat, directory: Path, tmp_path: Path, make_swarm: MakeSwarm
) -> None:
    quantize_model(directory, tmp_path / "q", format)
    model = AutoDistributedModelForCausalLM.from_pretrained(tmp_path / "q", torch_dtype="float32")
    expected, here = loss(stock(directory)), loss(model)
    model.close()
    model.connect(make_swarm(tmp_path / "q", {"a": (0, 2), "b": (2, 4)}).calls)
    assert here == pytest.approx(expected, abs=ERROR[format])
    assert loss(model) == pytest.approx(here, abs=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_the_clients_head_is_the_servers(format: QuantizedFormat, tmp_path: Path) -> None:
    quantize_model(tiny.save("llama", tmp_path / "m", intermediate_size=128), tmp_path / "q", format)
    model = AutoDistributedModelForCausalLM.from_pretrained(tmp_path / "q", torch_dtype="float32")
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.lm_head(model.bare.leaving(rows))
    model.close()
    torch.testing.assert_close(logits, load_span(tmp_path / "q", dtype="float32").logits(rows), rtol=1e-4, atol=1e-4)


def test_a_quantized_embedding_is_read_as_values_by_client_and_server(tmp_path: Path) -> None:
    quantize_model(tiny.save("llama", tmp_path / "m"), tmp_path / "q", "int8")
    shard = next(path for path in sorted((tmp_path / "q").glob("*.safetensors")) if "model.embed_tokens.weight" in load_file(path))
    tensors = load_file(shard)
    codes = quantize(tensors["model.embed_tokens.weight"], "int8")
    save_file(tensors | tensors_of("model.embed_tokens.weight", codes), shard)
    (tmp_path / "q" / "SHA256SUMS").unlink()
    enter(tmp_path / "q", "model.embed_tokens.weight.scale", shard.name)
    model = AutoDistributedModelForCausalLM.from_pretrained(tmp_path / "q", torch_dtype="float32")
    model.close()
    assert torch.equal(model.get_input_embeddings().weight, codes.widened())
    assert torch.equal(load_span(tmp_path / "q", dtype="float32").embed(torch.arange(9)), codes.widened()[:9])


def test_codes_without_their_scales_are_refused_and_not_taken_for_values(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones(tensors["lm_head.weight"].shape, dtype=torch.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds int8 codes where values are expected"):
        AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32")
    with pytest.raises(CheckpointError, match="codes where values are expected"):
        load_span(directory, dtype="float32")


def enter(directory: Path, name: str, shard: str) -> None:
    """Put a tensor into the index."""
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = shard
    index.write_text(json.dumps(content))
