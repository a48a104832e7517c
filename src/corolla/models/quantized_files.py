"""Quantized matrices in a checkpoint's files: bitsandbytes' 4-bit way for nf4, our own for int8 and int4.

bitsandbytes keeps a matrix `X.weight` as bytes [n / 2, 1], `X.weight.absmax`, `X.weight.quant_map` and a JSON text in
`X.weight.quant_state.bitsandbytes__nf4`; transformers reads it. Ours keeps `X.weight` (int8 [out, in], or uint8 [out, in / 2]),
`X.weight.scale` and, for int4, `X.weight.low`. The configuration's `quantization_config` says which.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from corolla.errors import CheckpointError, InvalidSetting, UnsupportedModel
from corolla.models.checkpoint import Checkpoint
from corolla.models.json_files import parse_json
from corolla.models.linear import WeightFormat
from corolla.models.quantized_tensor import INT4_GROUP, NF4_BLOCK, NF4_VALUES, QuantizedFormat, QuantizedTensor

METHOD = "corolla"
_STATE = "quant_state.bitsandbytes__nf4"
_CODES: dict[str, torch.dtype] = {"int8": torch.int8, "int4": torch.uint8}


def stored_format(checkpoint: Checkpoint) -> QuantizedFormat | None:
    """How the matrices of a checkpoint are quantized; None where they are not.

    Raises `UnsupportedModel` for a way that Corolla cannot read.
    """
    described = getattr(checkpoint.config, "quantization_config", None)
    if described is None:
        return None
    described = described if isinstance(described, dict) else described.to_dict()
    method, kind = described.get("quant_method"), described.get("format")
    if method == METHOD and kind in _CODES:
        return kind
    if described.get("load_in_4bit") and described.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    raise UnsupportedModel(
        f"{checkpoint.directory} is quantized in a way that is not read here ({method or 'unknown'}): Corolla reads bitsandbytes' nf4 and "
        "what `corolla quantize` writes; take the model as it was before"
    )


def settled_weights(checkpoint: Checkpoint, wanted: WeightFormat | None, default: WeightFormat) -> WeightFormat:
    """The format to keep weights in: the one that is `wanted`, or the checkpoint's own, or the `default`.

    Raises `InvalidSetting` where a quantized checkpoint would be quantized again or widened, `UnsupportedModel` as above.
    """
    stored = stored_format(checkpoint)
    if stored is None:
        return wanted or default
    if wanted not in (None, stored):
        raise InvalidSetting("weights", f"{checkpoint.directory} is quantized as {stored} already: leave this setting away")
    return stored


def stored_codes(checkpoint: Checkpoint, name: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantizedTensor | None:
    """The codes of matrix `name` [out, in]; None where it is not quantized.

    Raises `CheckpointError` for parts that are missing, damaged or of another shape.
    """
    if checkpoint.has(f"{name}.absmax"):
        return _nf4(checkpoint, name, shape, dtype)
    if not checkpoint.has(f"{name}.scale"):
        return None
    outputs, inputs = shape
    if checkpoint.has(f"{name}.low"):
        packed = checkpoint.tensor(name, shape=(outputs, inputs // 2))
        scale, low = (
            checkpoint.tensor(f"{name}.{part}", torch.float32, shape=(outputs, inputs // INT4_GROUP)) for part in ("scale", "low")
        )
        return QuantizedTensor("int4", shape, dtype, packed.flatten(), scale, low)
    scale = checkpoint.tensor(f"{name}.scale", torch.float32, shape=(outputs,))
    return QuantizedTensor("int8", shape, dtype, checkpoint.tensor(name, shape=shape), scale)


def stored_values(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Tensor `name` in `dtype`: dequantized where the checkpoint holds codes, for whoever computes with plain tensors.

    Raises `CheckpointError` and `UnsupportedModel` as `stored_codes` and `Checkpoint.tensor` do.
    """
    codes = stored_codes(checkpoint, name, (shape[0], shape[1]), dtype) if len(shape) == 2 else None
    return checkpoint.tensor(name, dtype, shape=shape) if codes is None else codes.widened()


def tensors_of(name: str, codes: QuantizedTensor) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a matrix, by name."""
    outputs, inputs = codes.shape
    if codes.format == "int8":
        return {name: codes.codes, f"{name}.scale": codes.scale}
    if codes.low is not None:
        return {name: codes.codes.view(outputs, inputs // 2), f"{name}.scale": codes.scale, f"{name}.low": codes.low}
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": str(codes.dtype).removeprefix("torch."), "shape": [outputs, inputs]}
    return {
        name: codes.codes.view(-1, 1),
        f"{name}.absmax": codes.scale,
        f"{name}.quant_map": torch.tensor(NF4_VALUES),
        f"{name}.{_STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def quantization_config(format: QuantizedFormat, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """For config.json. `dtype` is that of products with nf4, `skipped` are the modules that are no blocks."""
    if format != "nf4":
        return {"quant_method": METHOD, "format": format}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def _nf4(checkpoint: Checkpoint, name: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantizedTensor:
    count = shape[0] * shape[1]
    if count % NF4_BLOCK or not checkpoint.has(f"{name}.{_STATE}"):
        raise UnsupportedModel(
            f"{checkpoint.directory}: {name} is quantized with bitsandbytes, but not as nf4 in whole blocks of {NF4_BLOCK}"
        )
    try:
        state = parse_json(bytes(checkpoint.tensor(f"{name}.{_STATE}").tolist()))
        blocksize, stated = state["blocksize"], tuple(state["shape"])
        nested = {key: state[key] for key in ("nested_offset", "nested_blocksize")} if checkpoint.has(f"{name}.nested_absmax") else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.directory}: {name}.{_STATE} is damaged ({error}): fetch the model again") from None
    if blocksize != NF4_BLOCK or stated != shape:
        raise CheckpointError(
            f"{checkpoint.directory}: {name} is {list(stated)} in blocks of {blocksize}, where {list(shape)} in blocks of {NF4_BLOCK} "
            "is expected: fetch the model again"
        )
    codes = checkpoint.tensor(name, shape=(count // 2, 1)).flatten()
    scale = checkpoint.tensor(f"{name}.absmax", shape=(count // NF4_BLOCK,))
    if nested is not None:  # the scales are quantized too ("double quantization"): codes of 8 bits into a table
        table = checkpoint.tensor(f"{name}.nested_quant_map", torch.float32, shape=(256,))
        outer = checkpoint.tensor(f"{name}.nested_absmax", torch.float32)
        scale = table[scale.int()] * outer.repeat_interleave(nested["nested_blocksize"])[: len(scale)] + nested["nested_offset"]
    return QuantizedTensor("nf4", shape, dtype, codes, scale.float())
