"""Forward and backward without a session, against stock transformers with autograd."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from corolla.engine import calls
from corolla.engine.calls import Gradients, Sequences, backward, forward, job
from corolla.errors import InvalidSetting, ServerFault
from corolla.models.linear import PlainLinear
from corolla.models.span import SpanModel, load_span
from corolla.types import Span
from tests.engine.stock import StockBlocks, example
from tests.models import tiny

LENGTHS = (40, 40, 9, 33)
T = TypeVar("T")


def finish(call: Generator[None, None, T]) -> T:
    while True:
        try:
            next(call)
        except StopIteration as done:
            return done.value


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("span", [Span(0, 4), Span(1, 3)], ids=str)
@pytest.mark.parametrize("prompts", [0, 5])
def test_values_and_gradients_equal_stock(directory: Path, span: Span, prompts: int) -> None:
    model, stock = load_span(directory, Span(0, 4), dtype="float32"), StockBlocks(directory)
    sequences, gradient = example(span, LENGTHS, model.arch.hidden, prompts)
    assert error(finish(forward(model, sequences)), stock.run(sequences)) < 1e-5
    got, expected = finish(backward(model, sequences, gradient)), stock.gradients(sequences, gradient)
    assert error(got.hidden, expected.hidden) < 1e-5
    if prompts:
        assert got.prompts is not None
        assert expected.prompts is not None
        assert error(got.prompts, expected.prompts) < 1e-5


def widened(model: SpanModel, dtype: torch.dtype) -> SpanModel:
    """The same weights in plain products of another dtype."""

    def plain(linear: Any) -> PlainLinear:
        weight = linear.widened()
        bias = linear(torch.zeros(1, weight.shape[1], dtype=model.dtype))[0]
        return PlainLinear(weight.to(dtype), bias.to(dtype))

    def norm(norm: Any) -> Any:
        return norm and replace(norm, weight=norm.weight.to(dtype), bias=None if norm.bias is None else norm.bias.to(dtype))

    blocks = [
        replace(
            block,
            **{name: plain(getattr(block, name)) for name in ("qkv", "out", "up", "down")},
            gate=block.gate and plain(block.gate),
            **{name: norm(getattr(block, name)) for name in vars(type(block)) if name.endswith("_norm")},
        )
        for block in model.blocks
    ]
    return SpanModel(model.arch, model.span, dtype, model.device, "plain", blocks, None, None, None, None, 0)


@pytest.mark.parametrize("family", ["bloom", "llama", "gpt-neox"])
def test_gradients_in_double_precision_are_those_of_differences(family: str, tmp_path: Path) -> None:
    model = widened(load_span(tiny.save(family, tmp_path), Span(1, 3), dtype="float32"), torch.float64)
    sequences, gradient = example(Span(1, 3), (3, 5), 64, 2)
    assert sequences.prompts is not None
    inputs = [sequences.hidden.double(), sequences.prompts.double()]
    got = finish(backward(model, replace(sequences, hidden=inputs[0], prompts=inputs[1]), gradient.double()))
    for index, gradients in enumerate((got.hidden, got.prompts)):
        assert gradients is not None
        direction = torch.randn(inputs[index].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sides = []
        for step in (1e-5, -1e-5):
            moved = [tensor + step * direction if i == index else tensor for i, tensor in enumerate(inputs)]
            sides.append((finish(forward(model, replace(sequences, hidden=moved[0], prompts=moved[1]))) * gradient.double()).sum())
        difference = float(sides[0] - sides[1]) / 2e-5
        assert float((gradients * direction).sum()) == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("weights", ["plain", "packed", "int8", "int4"])
def test_bfloat16_errs_as_little_as_stock_does(llama: Path, weights: Any) -> None:
    model = load_span(llama, dtype="bfloat16", weights=weights)
    sequences, gradient = example(Span(0, 4), LENGTHS, 64, 5, dtype="bfloat16")
    exact = finish(backward(widened(model, torch.float32), sequences, gradient))
    got = finish(backward(model, sequences, gradient))
    stock = StockBlocks(llama, "bfloat16").gradients(sequences, gradient)
    reference = finish(backward(load_span(llama, dtype="bfloat16", weights="plain"), sequences, gradient))
    print(weights, error(got.hidden, exact.hidden), error(got.prompts, exact.prompts), error(stock.hidden, exact.hidden))
    del reference
