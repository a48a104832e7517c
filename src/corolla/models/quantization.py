"""A model's directory quantized into another one, block by block."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from corolla.errors import Conflict, InvalidSetting, StorageError, UnsupportedModel
from corolla.models.checkpoint import CHECKSUMS, INDEX, SINGLE, Checkpoint, json_object, write_checksums
from corolla.models.config import ModelConfig
from corolla.models.families import architecture
from corolla.models.quantized_files import quantization_config, stored_format, tensors_of
from corolla.models.quantized_tensor import NF4_BLOCK, QuantizedFormat, fits, quantize
from corolla.models.saving import replacing, save_tensors

_SHARD = "model-{number:05}-of-{count:05}.safetensors"


def quantize_model(source: Path, target: Path, format: QuantizedFormat, progress: Callable[[int, int], None] | None = None) -> int:
    """Write the model of `source` into the new directory `target` with its blocks' matrices in `format`; returns the bytes of its tensors.

    Norms, biases and embeddings stay as they are. So does the head with nf4, as in bitsandbytes' checkpoints; with int8 and int4 it is
    int8 where it is a matrix of its own. One block is in memory at a time, a shard each. `progress` gets (shards written, shards).

    Raises `InvalidSetting` for a model that is quantized already, `Conflict` where the target holds anything, `UnsupportedModel` for
    a family without mathematics here, `CheckpointError` and `StorageError`. After an error nothing that looks like a model is left.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Conflict(f"{target} is not empty: name a new directory for the quantized model")
    with Checkpoint(source) as checkpoint:
        if (stored := stored_format(checkpoint)) is not None:
            raise InvalidSetting("to", f"{source} is quantized as {stored} already: quantize the model as it was before")
        arch = architecture(checkpoint.config)
        shards = list(_shards(checkpoint, arch))
        unfinished = target.with_name(f".{target.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            total = _write(checkpoint, arch, shards, unfinished, format, progress)
            _describe(checkpoint, arch, source, unfinished, format)
            write_checksums(unfinished)
            if target.exists():
                target.rmdir()
            unfinished.rename(target)
        except OSError as error:
            raise StorageError(f"{target} cannot be written: {error.strerror or error}") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return total


def _shards(checkpoint: Checkpoint, arch: ModelConfig) -> Iterator[list[str]]:
    """The names of the tensors outside blocks, then those of each block."""
    in_block = re.compile(rf"(?:{'|'.join(map(re.escape, arch.names.prefixes))}){re.escape(arch.names.blocks)}\.(\d+)\..+")
    found: dict[int, list[str]] = {}
    for name in sorted(checkpoint.names):
        match = in_block.fullmatch(name)
        found.setdefault(-1 if match is None else int(match[1]), []).append(name)
    for _, names in sorted(found.items()):
        yield names


def _write(
    checkpoint: Checkpoint,
    arch: ModelConfig,
    shards: list[list[str]],
    directory: Path,
    format: QuantizedFormat,
    progress: Callable[[int, int], None] | None,
) -> int:
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensors |= _tensors(checkpoint, arch, name, format)
        file = _SHARD.format(number=number, count=len(shards)) if len(shards) > 1 else SINGLE
        with replacing(directory / file) as path:
            save_tensors(tensors, path)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        if progress is not None:
            progress(number, len(shards))
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with replacing(directory / INDEX) as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return total


def _tensors(checkpoint: Checkpoint, arch: ModelConfig, name: str, format: QuantizedFormat) -> Mapping[str, torch.Tensor]:
    weight = checkpoint.tensor(name)
    names, module = arch.names, name.removesuffix(".weight")
    if not name.endswith(".weight") or weight.ndim != 2 or not weight.is_floating_point():
        return {name: weight}
    matrices = (*names.qkv, names.out, names.up, names.down, *([names.gate] if names.gate else []))
    if re.search(rf"(?:^|\.){re.escape(names.blocks)}\.\d+\.(?:{'|'.join(map(re.escape, matrices))})$", module):
        if format == "nf4" and not fits(format, (weight.shape[0], weight.shape[1])):
            raise UnsupportedModel(f"{name} of shape {list(weight.shape)} is no whole number of nf4's blocks of {NF4_BLOCK}: use int8")
        if format == "nf4" and len(names.qkv) == 1 and module.endswith(names.qkv[0]) and weight.shape[1] % NF4_BLOCK:
            raise UnsupportedModel(
                f"nf4 keeps {NF4_BLOCK} inputs together, and {name} with rows of {weight.shape[1]} cannot be parted: use int8"
            )
        return tensors_of(name, quantize(weight, format))
    if module == names.head and not arch.tied and format != "nf4":
        return tensors_of(name, quantize(weight, "int8"))
    return {name: weight}


def _describe(checkpoint: Checkpoint, arch: ModelConfig, source: Path, directory: Path, format: QuantizedFormat) -> None:
    """The files beside the weights: the configuration with what was done, the others as they are."""
    config = json_object(source / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    embedding = f"{arch.names.prefixes[0]}{arch.names.embedding}"
    config["quantization_config"] = quantization_config(format, stored, sorted({"lm_head", arch.names.head, embedding}))
    with replacing(directory / "config.json") as path:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in sorted(source.iterdir()):
        kept = file.suffix in (".json", ".jinja", ".txt", ".model", ".md") and file.name not in ("config.json", INDEX, CHECKSUMS)
        if file.is_file() and kept:
            shutil.copyfile(file, directory / file.name)
