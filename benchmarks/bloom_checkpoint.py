"""Checkpoints of BLOOM's published shapes with random weights, in float16 as BLOOM's are stored; one block in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

SHAPES = {"560m": (1024, 24, 16), "3b": (2560, 30, 32), "7b1": (4096, 30, 32)}  # hidden, blocks, heads


def checkpoint_bytes(shape: str, vocabulary: int) -> int:
    """Of all tensors; embedding and head are one."""
    hidden, blocks, _ = SHAPES[shape]
    return 2 * (vocabulary * hidden + blocks * (12 * hidden**2 + 13 * hidden) + 4 * hidden)


def make_checkpoint(directory: Path, shape: str, vocabulary: int) -> None:
    """Write it, unless it is there already. Every block has the same weights, which changes no time."""
    if (directory / "config.json").exists():
        return
    hidden, blocks, heads = SHAPES[shape]
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    save(
        "ends.safetensors",
        {
            "transformer.word_embeddings.weight": _random(vocabulary, hidden),
            **_norm("transformer.word_embeddings_layernorm", hidden),
            **_norm("transformer.ln_f", hidden),
        },
    )
    block = {
        **_norm("input_layernorm", hidden),
        **_norm("post_attention_layernorm", hidden),
        **_linear("self_attention.query_key_value", 3 * hidden, hidden),
        **_linear("self_attention.dense", hidden, hidden),
        **_linear("mlp.dense_h_to_4h", 4 * hidden, hidden),
        **_linear("mlp.dense_4h_to_h", hidden, 4 * hidden),
    }
    for index in range(blocks):
        save(f"block-{index}.safetensors", {f"transformer.h.{index}.{name}": tensor for name, tensor in block.items()})
    index_file = {"metadata": {"total_size": checkpoint_bytes(shape, vocabulary)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = transformers.BloomConfig(
        vocab_size=vocabulary, hidden_size=hidden, n_layer=blocks, n_head=heads, dtype="float16", architectures=["BloomForCausalLM"], **ids
    )
    config.save_pretrained(directory)


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16).normal_(std=0.02)


def _norm(name: str, size: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(size, dtype=torch.float16), f"{name}.bias": torch.zeros(size, dtype=torch.float16)}


def _linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": _random(outputs, inputs), f"{name}.bias": torch.zeros(outputs, dtype=torch.float16)}
