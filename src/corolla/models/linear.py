"""Linear layers in the formats that a server keeps weights in, each with what follows it fused where the backend can.

Shapes: x [rows, in], weight [out, in], bias [out]; every method returns [rows, out] in x's dtype.
Measured on 2 cores (SmolLM2's shapes, one row, ms for all linears of a token): float32 stock 45, packed 24; bfloat16 stock 19,
packed 12; int8 9; int4 4.5 to 5. On one core, 4096 x 1024, µs at 1 / 8 / 64 rows: float32 packed 1202 / 1287 / 5386, float32 with
half-precision weights 383 / 809 / 5479, bfloat16 packed 586 / 676 / 2745.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch
from torch.nn import functional as F

from corolla.errors import InvalidSetting
from corolla.models.config import Activation
from corolla.models.nf4 import NF4
from corolla.models.quantized_tensor import INT4_GROUP, QuantizedTensor, quantize

WeightFormat = Literal["plain", "packed", "int8", "int4", "nf4"]
_BOUNDARY = 64  # bytes: torch allocates at its multiples; what lies in a mapped file, or is cut from another tensor, need not begin at one
_ROWS_AT_ONCE = 4096  # of a weight that is looked through, so that a head of gigabytes is not copied whole

ACTIVATE: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_ONEDNN_ACTIVATIONS = {"silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


class Linear(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """activation(linear(x))"""
        ...

    def added(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """linear(x) + other"""
        ...

    def multiplied(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """linear(x) * other"""
        ...

    def widened(self) -> torch.Tensor:
        """The weight [out, in] in the working dtype, as the product uses it; a copy wherever it is kept in another format."""
        ...


class Unfused(ABC):
    """What follows the product, as operations of its own."""

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return ACTIVATE[activation](self(x))

    def added(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self(x).add_(other)

    def multiplied(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self(x).mul_(other)


class PlainLinear(Unfused):
    """The stock product: any device and dtype, differentiable. The reference of the others."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def widened(self) -> torch.Tensor:
        return self.weight


class PackedLinear:
    """Weights reordered once into oneDNN's blocked layout (float32 or bfloat16, CPU): lossless.

    The operators are those that torch's own compiler emits; they are not public, so torch is pinned.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._unary = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._unary(x, self._weight, self._bias, "none", [], "")

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        name, algorithm = _ONEDNN_ACTIVATIONS[activation]
        return self._unary(x, self._weight, self._bias, name, [], algorithm)

    def added(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self._binary(x, other, self._weight, self._bias, "add")

    def multiplied(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self._binary(x, other, self._weight, self._bias, "mul")

    def widened(self) -> torch.Tensor:
        """Bit for bit the weight that was packed."""
        return self._weight.to_dense()


class HalfLinear(Unfused):
    """float32 products over weights that are kept in half precision without loss (CPU; FBGEMM's fp16 kernels).

    Most checkpoints are published in half precision, and widening them for float32 arithmetic doubles what each token reads
    from memory without adding a bit. The kernels widen each weight in a register instead; every sum runs over the inputs in
    one order, so that a row's result does not depend on how many rows are computed beside it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: float) -> None:
        """`weight` float32; times `scale`, a power of two, each of its values is a float16."""
        self._weight = torch.ops.quantized.linear_prepack_fp16((weight if scale == 1 else weight * scale).contiguous(), bias)
        self._unscale = 1 / scale
        self._product = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x if self._unscale == 1 else x * self._unscale, self._weight)

    def widened(self) -> torch.Tensor:
        """Bit for bit the weight that was packed."""
        weight = torch.ops.quantized.linear_unpack_fp16(self._weight)[0]
        return weight if self._unscale == 1 else weight * self._unscale

    @staticmethod
    def scale_of(weight: torch.Tensor) -> float | None:
        """The power of two that makes each value of `weight` a float16, or None where none does or this machine lacks the kernels.

        float16 spans 2^-24 to 2^16: with the largest weight put at its upper end, bfloat16 weights nearly always fit, too.
        """
        if weight.dtype != torch.float32 or torch.backends.quantized.engine not in ("fbgemm", "x86"):
            return None
        low, high = (extreme.item() for extreme in weight.aminmax())
        largest = max(-low, high)
        if not 0 < largest < math.inf:
            return None
        scales = (1.0, 2.0 ** (15 - math.frexp(largest)[1]))
        return next((scale for scale in scales if all(_halves(rows, scale) for rows in weight.split(_ROWS_AT_ONCE))), None)


def _halves(weight: torch.Tensor, scale: float) -> bool:
    scaled = weight * scale
    return torch.equal(scaled.half().float(), scaled) and torch.equal(scaled / scale, weight)


class Int8Linear(Unfused):
    """Symmetric int8, one scale a row, weights only.

    torch's operator is for CPUs. In 16 bits it takes multiples of 16 inputs, and reads rows and weights as if they began at a boundary:
    it crashes where they do not. Where it cannot be had, weights are widened for each product, which saves memory, not time.
    """

    def __init__(self, weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None) -> None:
        codes = weight if isinstance(weight, QuantizedTensor) else quantize(weight, "int8")
        self._weight, self._scale, self._bias = _at_boundary(codes.codes), codes.scale.to(codes.dtype), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or (x.dtype != torch.float32 and x.shape[1] % 16):
            return F.linear(x, self.widened(), self._bias)
        y = torch.ops.aten._weight_int8pack_mm(_at_boundary(x), self._weight, self._scale)
        return y if self._bias is None else y.add_(self._bias)

    def widened(self) -> torch.Tensor:
        """The weight [out, in] in the working dtype, as the codes give it back."""
        return self._weight.to(self._scale.dtype) * self._scale[:, None]


def _at_boundary(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.data_ptr() % _BOUNDARY == 0 else tensor.clone(memory_format=torch.contiguous_format)


class Int4Linear(Unfused):
    """Asymmetric int4 in groups of `INT4_GROUP` inputs, weights only (CPU)."""

    def __init__(self, weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None) -> None:
        codes = weight if isinstance(weight, QuantizedTensor) else quantize(weight, "int4")
        assert codes.low is not None, "the matrix does not fit int4"
        self._inputs = codes.shape[1]
        # The operator computes (q - 8) * scale + zero.
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.unpacked().to(torch.int32), 1)
        pairs = torch.stack([codes.scale, codes.low + 8 * codes.scale], -1)
        self._scale_and_zero = pairs.transpose(0, 1).contiguous().to(codes.dtype)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._weight, INT4_GROUP, self._scale_and_zero)
        return y if self._bias is None else y.add_(self._bias)

    def widened(self) -> torch.Tensor:
        """By the product itself, over the identity: how the codes lie depends on the machine, and only the operator knows."""
        identity = torch.eye(self._inputs, dtype=self._scale_and_zero.dtype)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(identity, self._weight, INT4_GROUP, self._scale_and_zero).t()


class NF4Linear(Unfused):
    """nf4, see `models.nf4`."""

    def __init__(self, weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None) -> None:
        self._nf4 = NF4(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._nf4.product(x)

    def widened(self) -> torch.Tensor:
        """The weight [out, in] in the working dtype, as the codes give it back."""
        return self._nf4.widened()


class Differentiable(Unfused):
    """A layer with gradients with respect to its input; its weights are frozen. The product's values are those of `linear`.

    A gradient widens the weight, which is held until `drop`. Of 1024 x 4096, unpacking takes 2 to 3 ms on one
    core (int4: 133), and the product with a gradient of 256 rows 11 in bfloat16 and 23 in float32; a second copy kept packed
    would double a server's memory for these few percent.
    """

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self._weight: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(x, self._linear, self)

    def widened(self) -> torch.Tensor:
        if self._weight is None:
            self._weight = self._linear.widened()
        return self._weight

    def drop(self) -> None:
        """Let go of the widened weight."""
        self._weight = None


class _FrozenProduct(torch.autograd.Function):
    """The operators of the packed formats have no derivative of their own. Nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: Linear, layer: Differentiable) -> torch.Tensor:
        ctx.layer = layer
        return linear(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0] @ ctx.layer.widened(), None, None


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN computes packed products in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_linear(weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None, fmt: WeightFormat) -> Linear:
    """A linear layer that keeps `weight` [out, in] in the format `fmt`; a format that this shape cannot take becomes int8 or packed.
    A weight that comes as codes keeps them.

    Raises:
        InvalidSetting: no such format, or one that the weight's device cannot compute.
    """
    if fmt not in get_args(WeightFormat):
        raise InvalidSetting("weights", f"{fmt!r} is none of {', '.join(get_args(WeightFormat))}")
    device = weight.codes.device if isinstance(weight, QuantizedTensor) else weight.device
    if device.type != "cpu" and fmt in ("packed", "int4"):
        raise InvalidSetting("weights", f"{fmt!r} weights are computed on the CPU only; use 'plain', 'int8' or 'nf4' on {device.type}")
    if isinstance(weight, QuantizedTensor):
        kinds: dict[str, type[Int8Linear | Int4Linear | NF4Linear]] = {"int8": Int8Linear, "int4": Int4Linear, "nf4": NF4Linear}
        return kinds[weight.format](weight, bias)
    if fmt == "plain":
        return PlainLinear(weight, bias)
    if fmt == "packed":
        if (scale := HalfLinear.scale_of(weight)) is not None:
            return HalfLinear(weight, bias, scale)
        return PackedLinear(weight, bias) if can_pack(weight.dtype) else PlainLinear(weight, bias)
    return make_linear(quantize(weight, fmt), bias, fmt)
