"""Tiny random checkpoints of every supported family, made by the stock classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 199
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_FALCON = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 128, "max_position_embeddings": 512}

# name -> (model_type, config)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 4, "n_head": 4}),
    "bloom-6-heads": ("bloom", {"hidden_size": 96, "n_layer": 4, "n_head": 6}),
    "llama": ("llama", _LLAMA),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        "llama",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral-window": ("mistral", {**_LLAMA, "sliding_window": 24}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2-window": ("qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 32}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 32}),
    "gemma2": ("gemma2", {**_LLAMA, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", {**_LLAMA, "head_dim": 32, "sliding_window": 24, "sliding_window_pattern": 2}),
    "falcon-7b": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon-rw": ("falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gpt-neox": (
        "gpt_neox",
        {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    ),
    "gpt-neox-sequential": ("gpt_neox", {**_LLAMA, "use_parallel_residual": False}),
}


def save(name: str, directory: Path, *, spread: float = 0.12, **changes: Any) -> Path:
    """A checkpoint of `CONFIGS[name]` with weights large enough that logits differ clearly; a wide model needs a smaller `spread`."""
    model_type, settings = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, "eos_token_id": 2, "pad_token_id": 0, **settings, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=spread)
            else:
                # Norms and biases away from their neutral values, or a forgotten one would not show.
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory
