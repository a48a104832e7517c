"""A tiny model, dialogues and data for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from corolla.data.tokens import Kind, Tokens

SHAPES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "seq_length": 256},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
    },
}
SHAPES["mistral"] = {**SHAPES["llama"], "sliding_window": 4}
SHAPES["gpt_neox"] = {name: value for name, value in SHAPES["llama"].items() if name != "num_key_value_heads"}


def make_model(family: str, vocabulary: int = 400) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SHAPES[family])
    return AutoModelForCausalLM.from_config(config)


def make_directory(directory: Path, family: str = "bloom") -> Path:
    """A whole model: weights and the byte-level toy tokenizer."""
    make_model(family).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=toy.byte_level(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(directory)
    return directory


def dialogues(file: Path, count: int = 40) -> Path:
    """As many dialogues as JSONL."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"hello, this is {number}"},
                {"role": "assistant", "content": f"hello {number}, how are you?"},
            ]
        }
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sequence(*lengths: int, padding: int = 0, prompt: int = 1, seed: int = 0) -> Tokens:
    """Articles of these lengths side by side, each beginning with `prompt` tokens that are not trained on, then padding."""
    generator = np.random.default_rng(seed)
    ids, kinds = [], []
    for length in lengths:
        ids += generator.integers(5, 399, length).tolist()
        kinds += [Kind.PROMPT] * prompt + [Kind.COMPLETION] * (length - prompt - 1) + [Kind.END]
    ids += [2] * padding
    kinds += [Kind.PADDING] * padding
    return Tokens(np.array(ids, np.int32), np.array(kinds, np.int32))
