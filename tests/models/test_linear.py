"""The formats of weights against the plain product."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from corolla.errors import InvalidSetting
from corolla.models.config import Activation
from corolla.models.linear import Differentiable, HalfLinear, Int8Linear, PlainLinear, can_pack, make_linear
from corolla.models.quantized_tensor import quantize

SHAPE = 64, 96  # out, in


def weights(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator).mul(0.1).to(dtype), torch.randn(SHAPE[0], generator=generator).to(dtype)


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_packed_is_lossless(rows: int, dtype: torch.dtype, biased: bool) -> None:
    weight, bias = weights(dtype)
    plain, packed = (make_linear(weight, bias if biased else None, fmt) for fmt in ("plain", "packed"))
    x, other = torch.randn(rows, SHAPE[1]).to(dtype), torch.randn(rows, SHAPE[0]).to(dtype)
    # What is fused is rounded once instead of twice.
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(packed(x), plain(x), **close)
    torch.testing.assert_close(packed.added(x, other), plain.added(x, other), **close)
    torch.testing.assert_close(packed.multiplied(x, other), plain.multiplied(x, other), **close)
    activations: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")
    for activation in activations:
        torch.testing.assert_close(packed.activated(x, activation), plain.activated(x, activation), **close)


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16])
def test_weights_published_in_half_precision_are_kept_in_it(kept: torch.dtype) -> None:
    weight, bias = (tensor.to(kept).float() for tensor in weights(torch.float32))
    linear = make_linear(weight, bias, "packed")
    assert isinstance(linear, HalfLinear)
    assert torch.equal(linear.widened(), weight)
    x, plain = torch.randn(33, SHAPE[1]), PlainLinear(weight, bias)
    torch.testing.assert_close(linear(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(linear(x[:1]), linear(x)[:1])


def test_weights_that_half_precision_would_change_are_not() -> None:
    weight, _ = weights(torch.float32)
    assert HalfLinear.scale_of(weight) is None
    assert HalfLinear.scale_of(weight.half().float()) == 1
    tiny = weight.bfloat16().float() * 2.0**-30
    assert HalfLinear.scale_of(tiny) == 2.0 ** (45 - math.frexp(weight.bfloat16().abs().max().item())[1])
    spread = torch.tensor([[1.0, 2.0**-40]])
    assert HalfLinear.scale_of(spread) is None
    assert HalfLinear.scale_of(torch.zeros(2, 2)) is None
    assert HalfLinear.scale_of(torch.tensor([[math.nan, 1.0]])) is None


@pytest.mark.parametrize(("fmt", "error"), [("int8", 0.01), ("int4", 0.12)])
def test_quantized_products_err_as_little_as_they_say(fmt: Any, error: float) -> None:
    weight, bias = weights(torch.bfloat16)
    x = torch.randn(8, SHAPE[1]).bfloat16()
    exact = PlainLinear(weight.float(), bias.float())(x.float())
    assert (make_linear(weight, bias, fmt)(x).float() - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_takes_what_begins_anywhere(rows: int, dtype: torch.dtype) -> None:
    """As codes do that lie in a mapped file, and rows cut from others."""
    codes = quantize(weights(dtype)[0], "int8")
    usual = Int8Linear(codes, None)
    odd = Int8Linear(replace(codes, codes=anywhere(codes.codes, 8)), None)
    x = torch.randn(rows, SHAPE[1]).to(dtype)
    assert torch.equal(odd(anywhere(x, x.element_size())), usual(x))


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("inputs", [24, 50])
def test_int8_takes_any_number_of_inputs(rows: int, inputs: int) -> None:
    linear = Int8Linear(torch.randn(40, inputs).bfloat16(), None)
    x = torch.randn(rows, inputs).bfloat16()
    torch.testing.assert_close(linear(x), x @ linear.widened().t())


def anywhere(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins so many bytes behind where torch would let it begin."""
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + offset
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def test_int8_widened_equals_its_product() -> None:
    weight, bias = weights(torch.float32)
    linear = Int8Linear(weight, bias)
    x = torch.randn(3, SHAPE[1])
    torch.testing.assert_close(torch.nn.functional.linear(x, linear.widened(), bias), linear(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", ["plain", "packed", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened_weights_are_those_of_the_product(fmt: Any, dtype: torch.dtype) -> None:
    weight, _ = weights(dtype)
    linear = make_linear(weight, None, fmt)
    widened = linear.widened()
    assert widened.dtype == dtype
    if fmt in ("plain", "packed"):
        assert torch.equal(widened, weight)
    x = torch.randn(5, SHAPE[1]).to(dtype)
    torch.testing.assert_close(torch.nn.functional.linear(x, widened), linear(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("fmt", ["plain", "packed", "int8", "int4"])
def test_gradients_are_those_of_the_stock_product(fmt: Any) -> None:
    weight, bias = weights(torch.float32)
    linear = make_linear(weight, bias, fmt)
    differentiable, stock = Differentiable(linear), PlainLinear(linear.widened(), bias)
    x, other, gradient = torch.randn(5, SHAPE[1]), torch.randn(5, SHAPE[0]), torch.randn(5, SHAPE[0])
    x.requires_grad_()
    other.requires_grad_()
    for call in (
        lambda linear: linear(x),
        lambda linear: linear.activated(x, "gelu_tanh"),
        lambda linear: linear.added(x, other),
        lambda linear: linear.multiplied(x, other),
    ):
        got, expected = (torch.autograd.grad(call(each), [x, other], gradient, allow_unused=True) for each in (differentiable, stock))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_keeps_the_products_values() -> None:
    linear = make_linear(*weights(torch.bfloat16), "packed")
    x = torch.randn(5, SHAPE[1]).bfloat16()
    assert torch.equal(Differentiable(linear)(x.clone().requires_grad_()), linear(x))


def test_shapes_that_int4_cannot_take_become_int8() -> None:
    assert isinstance(make_linear(torch.randn(64, 50), None, "int4"), Int8Linear)


def test_what_a_device_cannot_compute_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="weights"):
        make_linear(torch.empty(64, 96, device="meta"), None, "int4")
    with pytest.raises(InvalidSetting, match="int3"):
        make_linear(torch.randn(4, 4), None, "int3")  # type: ignore[arg-type]
    assert not can_pack(torch.float64)
