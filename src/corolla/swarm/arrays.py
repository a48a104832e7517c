"""Tensors as they travel: their bytes in a wire dtype, and back; block-wise 8-bit among them.

torch is imported inside: the messages are known to thin clients too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from corolla.errors import ProtocolError, ServerFault
from corolla.messages import Q8_BLOCK, Array, WireDtype

if TYPE_CHECKING:
    import torch


def to_array(tensor: torch.Tensor, wire_dtype: WireDtype) -> Array:
    """`tensor` [rows, values] as it travels; shares memory with it where no conversion is needed, so leave it as it is until sent.

    In `q8` a value is off by at most 1/254 of the largest magnitude among its block of 64; a block that is not finite stays so.
    Raises `ServerFault` when a finite value does not fit float16.
    """
    import torch

    tensor = tensor.detach()
    rows, values = tensor.shape
    if wire_dtype == "q8":
        return Array("q8", (rows, values), _bytes_of(_quantize(tensor)))
    converted = tensor.to("cpu", getattr(torch, wire_dtype)).contiguous()
    if wire_dtype == "float16" and tensor.dtype != torch.float16 and not bool(converted.isfinite().all()):
        raise ServerFault("hidden states do not fit float16: let the servers exchange bfloat16, float32 or q8")
    return Array(wire_dtype, (rows, values), _bytes_of(converted.view(torch.uint8)))


def from_array(array: Array) -> torch.Tensor:
    """The tensor [rows, values] that `array` describes, on the CPU, in its dtype (float32 for `q8`).

    Shares memory with a writable `data`; bytes from the network are copied once. Raises `ProtocolError` when `data` has
    not the size that the shape asks for.
    """
    import torch

    if array.data.nbytes != array.nbytes:
        raise ProtocolError(f"{array.dtype} of shape {array.shape} takes {array.nbytes} bytes, not {array.data.nbytes}")
    raw = torch.frombuffer(bytearray(array.data) if array.data.readonly else array.data, dtype=torch.uint8)
    if array.dtype == "q8":
        return _dequantize(raw, *array.shape)
    return raw.view(getattr(torch, array.dtype)).view(array.shape)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().numpy().data


def _quantize(tensor: torch.Tensor) -> torch.Tensor:
    """Codes and scales in one uint8 tensor; blocks with a largest magnitude, after bitsandbytes (Dettmers et al., 2022)."""
    import torch

    rows, values = tensor.shape
    blocks = math.ceil(values / Q8_BLOCK)
    padded = torch.nn.functional.pad(tensor.to("cpu", torch.float32), (0, blocks * Q8_BLOCK - values)).view(rows, blocks, Q8_BLOCK)
    scales = padded.abs().amax(dim=2) / 127  # of a block with a NaN or an infinity: not finite, and so is what comes out of it
    divisors = torch.where(scales == 0, 1.0, scales)[:, :, None]
    codes = (padded / divisors).nan_to_num(1.0).round().clamp(-127, 127).to(torch.int8).view(rows, -1)[:, :values]
    return torch.cat((codes.reshape(-1).view(torch.uint8), scales.view(-1).view(torch.uint8)))


def _dequantize(raw: torch.Tensor, rows: int, values: int) -> torch.Tensor:
    """By NumPy, which computes on the calling thread alone, where torch would give a server's network thread a team of its own."""
    import numpy as np
    import torch

    data = raw.numpy()
    codes = data[: rows * values].view(np.int8).reshape(rows, values)
    scales = np.frombuffer(data[rows * values :].tobytes(), np.float32).reshape(rows, -1)  # copied: float32 has to be aligned
    with np.errstate(invalid="ignore", over="ignore"):  # a block whose scale is not finite, or too large, is to come out so
        return torch.from_numpy(codes * np.repeat(scales, Q8_BLOCK, axis=1)[:, :values])
