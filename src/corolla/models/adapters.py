"""LoRA adapters (Hu et al., 2021) from PEFT's files: what is added to the products of a model's blocks, for each as it is computed here.

A directory holds `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them: for each matrix W [O, I] that is
adapted A [r, I] and B [O, r], of which scale * B A is added to W. The scale goes into B here. Where query, key and value are one
product, so are their factors: those of three matrices lie side by side in A [3r, I] and along a diagonal in B; the rows of a fused
one are put in the order of its weights.

Legend: R rank of a product's factors, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from corolla.errors import AdapterError
from corolla.models.config import ModelConfig
from corolla.models.peft_files import CONFIG, WEIGHTS, read_config, read_tensors
from corolla.types import AdapterPart, Factors, Span

_WHAT = "LoRA adapter"
PRODUCTS = ("qkv", "out", "up", "gate", "down")  # of a block, as `models.block.Block` names them

# What a configuration says of its files, of the training and of the choice of matrices, which the tensors' names tell too. Whatever
# else it asks for changes what is computed.
_OF_NO_MATTER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    }
)
_UNCHANGED_BASE = (None, True, False, "gaussian", "orthogonal", "eva")  # other ways to begin change the weights below, too


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is added in each block of a model, by product; float32 on the CPU. Two of one content have one `digest`."""

    blocks: tuple[Mapping[str, Factors], ...]

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        return tuple(map(digest_of, self.blocks))

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits, of the factors and of nothing else."""
        return joined_digest(self.digests)

    @property
    def largest_block(self) -> int:
        """How many numbers the factors of one block have at most."""
        return max(sum(factor.numel() for factors in block.values() for factor in factors) for block in self.blocks)

    def part(self, span: Span) -> AdapterPart:
        """What the servers of these blocks need of it."""
        return AdapterPart(self.digest, span, self.blocks[span.start : span.end], self.digests)


def digest_of(block: Mapping[str, Factors]) -> bytes:
    """SHA-256 of what is added in one block: names, shapes, and float32 values as they lie in memory (little-endian)."""
    hashed = hashlib.sha256()
    for product in PRODUCTS:
        for factor in block.get(product, ()):
            hashed.update(f"{product}{list(factor.shape)}".encode())
            hashed.update(factor.contiguous().numpy().astype("<f4", copy=False).data)
    return hashed.digest()


def joined_digest(digests: Iterable[bytes]) -> str:
    """The name of an adapter whose blocks have these digests."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def load_adapter(directory: Path, architecture: ModelConfig) -> Adapter:
    """The adapter that PEFT saved in `directory`, for the model of `architecture`.

    Raises `AdapterError` when a file is missing or damaged, when the adapter is of another kind, asks for what is not computed here,
    or is not finite, and when it is not for this model.
    """
    directory = Path(directory)
    config = read_config(directory / CONFIG, "LORA", _WHAT, AdapterError)
    rank, scale = _rank_and_scale(directory / CONFIG, config)
    matrices = _matrices(directory / WEIGHTS, architecture, rank)
    if not matrices:
        raise AdapterError(f"{directory / WEIGHTS} adapts nothing: train it again")
    _check_complete(directory, config, matrices, architecture)
    return Adapter(tuple(_packed(of_block, architecture, scale) for of_block in _by_block(matrices, architecture.blocks)))


def _rank_and_scale(path: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    known = _OF_NO_MATTER | {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"}
    asked = [name for name, value in sorted(config.items()) if name not in known and value]
    if config.get("bias", "none") != "none":
        asked.append("bias")
    if config.get("init_lora_weights") not in _UNCHANGED_BASE:
        asked.append("init_lora_weights")
    if asked:
        raise AdapterError(f"{path}: {asked[0]} {json.dumps(config[asked[0]])} is not supported: train the adapter without it")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"{path}: r is {rank!r} and has to be an integer of at least 1")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: lora_alpha is {alpha!r} and has to be a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


_Matrices = dict[tuple[int, str], Factors]  # by block and the name of a matrix within it


def _matrices(path: Path, architecture: ModelConfig, rank: int) -> _Matrices:
    """Everything in the file, checked."""
    names, shapes = architecture.names, _shapes(architecture)
    roots = "|".join(re.escape(prefix) for prefix in names.prefixes)
    matrix = "|".join(map(re.escape, shapes))
    pattern = re.compile(rf"base_model\.model\.(?:{roots}){re.escape(names.blocks)}\.(\d+)\.({matrix})\.lora_([AB])\.weight")
    halves: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(path, _WHAT, AdapterError)[0].items():
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) >= architecture.blocks:
            raise AdapterError(
                f"{path} adapts {name.removeprefix('base_model.model.')}, which is no product of the {architecture.blocks} blocks of this "
                f"{architecture.family}: it was trained for another model, or for more than its blocks"
            )
        outputs, inputs = shapes[match[2]]
        shape = (rank, inputs) if match[3] == "A" else (outputs, rank)
        if tensor.shape != shape:
            raise AdapterError(f"{path}: {name} has the shape {list(tensor.shape)} in place of {list(shape)}: it is of another model")
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{path}: {name} has values that are NaN or infinite: train it again with a lower learning rate")
        halves.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor.to(torch.float32)
    for (block, name), pair in halves.items():
        if len(pair) < 2:
            raise AdapterError(f"{path} holds half of what it adds to {name} of block {block}: save it again")
    return {at: Factors(pair["A"], pair["B"]) for at, pair in halves.items()}


def _check_complete(directory: Path, config: Mapping[str, Any], matrices: _Matrices, architecture: ModelConfig) -> None:
    """An adapter of a model with fewer blocks fits in every other way. Raises `AdapterError`."""
    targets = config.get("target_modules")
    everywhere = isinstance(targets, list) and not any("." in str(target) for target in targets)
    if not everywhere or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    adapted = {block for block, _ in matrices}
    if missing := set(range(architecture.blocks)) - adapted:
        raise AdapterError(
            f"{directory} adapts {len(adapted)} blocks, and not block {min(missing)} of this model's {architecture.blocks}: "
            "it was trained for another model"
        )


def _by_block(matrices: _Matrices, blocks: int) -> list[dict[str, Factors]]:
    found: list[dict[str, Factors]] = [{} for _ in range(blocks)]
    for (block, name), factors in matrices.items():
        found[block][name] = factors
    return found


def _packed(of_block: Mapping[str, Factors], architecture: ModelConfig, scale: float) -> dict[str, Factors]:
    """One block's, by product."""
    names = architecture.names
    scaled = {name: Factors(factors.a.contiguous(), factors.b * scale) for name, factors in of_block.items()}
    packed = {}
    if len(names.qkv) == 1 and names.qkv[0] in scaled:
        fused = scaled[names.qkv[0]]
        packed["qkv"] = Factors(fused.a, architecture.ungrouped(fused.b))
    elif len(names.qkv) == 3 and any(name in scaled for name in names.qkv):
        packed["qkv"] = _side_by_side([scaled.get(name) for name in names.qkv], _attention_rows(architecture))
    for product in PRODUCTS[1:]:
        name = getattr(names, product)
        if name in scaled:
            packed[product] = scaled[name]
    return packed


def _side_by_side(parts: list[Factors | None], rows: tuple[int, ...]) -> Factors:
    """Several matrices that read the same inputs, as one product of so many rows each."""
    present = [part for part in parts if part is not None]
    b_OxR = torch.zeros(sum(rows), sum(part.a.shape[0] for part in present))
    row = column = 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None:
            b_OxR[row : row + count, column : column + part.a.shape[0]] = part.b
            column += part.a.shape[0]
        row += count
    return Factors(torch.cat([part.a for part in present]), b_OxR)


def _attention_rows(architecture: ModelConfig) -> tuple[int, ...]:
    arch = architecture
    return arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.kv_heads * arch.head_dim


def _shapes(architecture: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shape [O, I] of each matrix of a block, by its name there."""
    names, products = architecture.names, architecture.products
    shapes = {getattr(names, product): shape for product, shape in products.items() if product != "qkv"}
    if len(names.qkv) == 1:
        return shapes | {names.qkv[0]: products["qkv"]}
    return shapes | {name: (rows, architecture.hidden) for name, rows in zip(names.qkv, _attention_rows(architecture), strict=True)}
