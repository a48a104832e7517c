"""Soft prompts and their files: PEFT's format for the rows in front, and a file of our own for those at every block.

A directory holds `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them for prompt tuning (Lester et al., 2021),
so that either library loads what the other one saved. Deep prompts lie beside them in `deep_prompts.safetensors`: one
tensor `prompts` [B, P, E]. What PEFT does not look at is in the metadata of the safetensors files: the base model's shape, and the
prompt's digest, by which files that were not saved together are told apart.

Legend: B blocks, P soft tokens, E hidden, L labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from corolla.errors import PromptError
from corolla.models.config import ModelConfig
from corolla.models.json_files import parse_json
from corolla.models.peft_files import CONFIG, WEIGHTS, read_config, read_tensors
from corolla.models.saving import replacing

_WHAT = "soft prompt"
DEEP = "deep_prompts.safetensors"

_INPUT, _PROMPTS, _SCORE = "prompt_embeddings", "prompts", "base_model.score.weight"  # tensors' names
_MODEL, _DIGEST = "corolla_model", "corolla_prompt"  # in the metadata
_SHAPE = ("family", "blocks", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary")


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Trained rows, on the CPU and contiguous; two of one content have one `digest`.

    Args:
        input: [P, E] float32, what stands in front of the input's embeddings, P at least 1.
        deep: [B, P, E] float32, what is added to the first P hidden states at each block's input; None without them.

    Raises `PromptError` for another shape or dtype, and for values that are not finite.
    """

    input: torch.Tensor
    deep: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check("the prompt", self.input, 2)
        if self.deep is not None:
            _check("the deep prompt", self.deep, 3)
            if self.deep.shape[1:] != self.input.shape:
                raise PromptError(
                    f"the deep prompt has shape {list(self.deep.shape)}, and with an input of {list(self.input.shape)} it has to be "
                    f"[blocks, {self.input.shape[0]}, {self.input.shape[1]}]"
                )

    def __len__(self) -> int:
        """Soft tokens."""
        return len(self.input)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the shapes and of the float32 values as they lie in memory (little-endian)."""
        hashed = hashlib.sha256()
        for tensor in (self.input, self.deep):
            if tensor is not None:
                hashed.update(f"{list(tensor.shape)}".encode())
                hashed.update(tensor.numpy().astype("<f4", copy=False).data)
        return hashed.hexdigest()

    def check(self, architecture: ModelConfig) -> None:
        """Raises `PromptError` when its rows are not of this model's width, or its blocks not as many as the model's."""
        if self.input.shape[1] != architecture.hidden:
            raise PromptError(
                f"the prompt's rows have {self.input.shape[1]} values, and the model's hidden states {architecture.hidden}: "
                "it was trained for another model"
            )
        if self.deep is not None and len(self.deep) != architecture.blocks:
            raise PromptError(
                f"the deep prompt is for {len(self.deep)} blocks, and the model has {architecture.blocks}: it was trained for another model"
            )
        if len(self) >= architecture.context_length:
            raise PromptError(f"the prompt has {len(self)} tokens, and the model's context holds {architecture.context_length}")


def save_prompt(
    directory: Path, prompt: SoftPrompt, architecture: ModelConfig, *, base_model: str = "", score: torch.Tensor | None = None
) -> None:
    """Save a prompt for the model of `architecture`; files of an earlier one in `directory` are replaced.

    Args:
        base_model: the model's name or directory, which PEFT loads by it.
        score: [L, E], the head of a classifier that was trained with the prompt.

    Raises `PromptError` when it does not fit the model, `StorageError` when the disk refuses.
    """
    prompt.check(architecture)
    directory = Path(directory)
    metadata = {"format": "pt", _MODEL: json.dumps(_shape_of(architecture)), _DIGEST: prompt.digest}
    tensors = {_INPUT: prompt.input}
    if score is not None:
        if score.ndim != 2 or score.shape[1] != architecture.hidden or not bool(score.isfinite().all()):
            raise PromptError(f"the classifier's head has to be finite and of shape [labels, {architecture.hidden}]")
        tensors[_SCORE] = score.detach().to("cpu", torch.float32).contiguous()
    # A reader that comes in between sees by the digest that the files are not of one prompt.
    if prompt.deep is not None:
        with replacing(directory / DEEP) as path:
            path.write_bytes(save({_PROMPTS: prompt.deep}, metadata))
    with replacing(directory / WEIGHTS) as path:
        path.write_bytes(save(tensors, metadata))
    if prompt.deep is None:
        (directory / DEEP).unlink(missing_ok=True)
    with replacing(directory / CONFIG) as path:
        path.write_text(
            json.dumps(_config_of(prompt, architecture, base_model, score is not None), indent=2, sort_keys=True), encoding="utf-8"
        )


def load_prompt(directory: Path, architecture: ModelConfig) -> SoftPrompt:
    """The prompt in `directory`, of ours or of PEFT's, for the model of `architecture`.

    Raises `PromptError` when a file is missing, damaged or of another kind, when its values are not finite, and when the prompt is
    not for this model.
    """
    directory = Path(directory)
    config = read_config(directory / CONFIG, "PROMPT_TUNING", _WHAT, PromptError)
    if config.get("num_transformer_submodules") not in (None, 1):
        raise PromptError(
            f"{directory / CONFIG} describes a prompt for an encoder and a decoder: only language models with a decoder are served"
        )
    tensors, metadata = read_tensors(directory / WEIGHTS, _WHAT, PromptError)
    if _INPUT not in tensors:
        raise PromptError(f"{directory / WEIGHTS} has no tensor {_INPUT}: it is no prompt that PEFT's prompt tuning saved")
    asked = [config.get("num_virtual_tokens"), config.get("token_dim") or tensors[_INPUT].shape[-1]]
    if list(tensors[_INPUT].shape) != asked:
        raise PromptError(f"{directory / WEIGHTS} holds rows {list(tensors[_INPUT].shape)} where {CONFIG} says {asked}")
    deep: torch.Tensor | None = None
    metadata_of_deep: Mapping[str, str] = {}
    if (directory / DEEP).exists():
        found, metadata_of_deep = read_tensors(directory / DEEP, _WHAT, PromptError)
        if _PROMPTS not in found:
            raise PromptError(f"{directory / DEEP} has no tensor {_PROMPTS}: save the prompt again")
        deep = _plain(found[_PROMPTS])
    for described in (metadata, metadata_of_deep):
        _check_model(directory, described, architecture)
    try:
        prompt = SoftPrompt(_plain(tensors[_INPUT]), deep)
        prompt.check(architecture)
    except PromptError as error:
        raise PromptError(f"{directory}: {error}") from None
    if any(described.get(_DIGEST, prompt.digest) != prompt.digest for described in (metadata, metadata_of_deep)):
        raise PromptError(f"{directory}: its files are not of one prompt, or damaged: save it again")
    return prompt


def load_score(directory: Path, architecture: ModelConfig) -> torch.Tensor | None:
    """The head [L, E] float32 of the classifier that was saved with a prompt, if any. Raises `PromptError` as `load_prompt`."""
    score = read_tensors(Path(directory) / WEIGHTS, _WHAT, PromptError)[0].get(_SCORE)
    if score is None:
        return None
    if score.ndim != 2 or score.shape[1] != architecture.hidden or not bool(score.isfinite().all()):
        raise PromptError(f"{directory}: the classifier's head has to be finite and of shape [labels, {architecture.hidden}]")
    return _plain(score)


def _check(what: str, tensor: torch.Tensor, dimensions: int) -> None:
    if tensor.ndim != dimensions or 0 in tensor.shape:
        names = "[tokens, hidden]" if dimensions == 2 else "[blocks, tokens, hidden]"
        raise PromptError(f"{what} has shape {list(tensor.shape)} where {names} are asked for, none of them 0")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.requires_grad:
        raise PromptError(f"{what} is {tensor.dtype} on {tensor.device}: give detached float32 rows that lie side by side on the CPU")
    if not bool(tensor.isfinite().all()):
        raise PromptError(f"{what} has values that are NaN or infinite: train it again with a lower learning rate")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _shape_of(architecture: ModelConfig) -> dict[str, Any]:
    return {name: getattr(architecture, name) for name in _SHAPE}


def _config_of(prompt: SoftPrompt, architecture: ModelConfig, base_model: str, classifies: bool) -> dict[str, Any]:
    """As PEFT 0.21 writes it."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "modules_to_save": ["classifier", "score"] if classifies else None,
        "num_attention_heads": architecture.heads,
        "num_layers": architecture.blocks,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(prompt),
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
        "token_dim": architecture.hidden,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def _check_model(directory: Path, metadata: Mapping[str, str], architecture: ModelConfig) -> None:
    """Raises `PromptError` when the metadata names another model's shape."""
    if _MODEL not in metadata:
        return
    try:
        described = dict(parse_json(metadata[_MODEL]))
    except (ValueError, TypeError):
        raise PromptError(f"{directory}: the metadata {_MODEL} is damaged: save the prompt again") from None
    differing = [name for name, value in _shape_of(architecture).items() if described.get(name) != value]
    if differing:
        name = differing[0]
        raise PromptError(
            f"{directory} was trained for another model: its {name} is {described.get(name)!r}, this one's {getattr(architecture, name)!r}"
        )
