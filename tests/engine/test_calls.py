"""Forward and backward without a session, against stock transformers with autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch

from corolla.engine.calls import TURN_ROWS, backward, forward
from corolla.models.linear import PlainLinear
from corolla.models.span import SpanModel, load_span
from corolla.types import Span
from tests.engine.driving import Chain
from tests.engine.stock import StockBlocks, example, finish
from tests.models import tiny

LENGTHS = (40, 40, 9, 33)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


@dataclass(eq=False)
class Saved:
    """A tensor that autograd keeps."""

    tensor: torch.Tensor


def norm_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


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
def test_bfloat16_errs_no_more_than_stock_does(llama: Path, weights: Any) -> None:
    sequences, gradient = example(Span(0, 4), LENGTHS, 64, 5, dtype="bfloat16")
    exact = finish(backward(widened(load_span(llama, dtype="bfloat16", weights="plain"), torch.float32), sequences, gradient))
    stock = StockBlocks(llama, "bfloat16").gradients(sequences, gradient)
    model = load_span(llama, dtype="bfloat16", weights=weights)
    # Of the weights as they are kept: what quantizing did to them is not the gradient's fault.
    kept = finish(backward(widened(model, torch.float32), sequences, gradient))
    got = finish(backward(model, sequences, gradient))
    assert got.hidden.dtype == torch.bfloat16
    assert norm_error(got.hidden, kept.hidden) < 1.5 * norm_error(stock.hidden, exact.hidden)
    assert got.prompts is not None
    assert kept.prompts is not None
    assert stock.prompts is not None
    assert exact.prompts is not None
    assert norm_error(got.prompts, kept.prompts) < 1.5 * norm_error(stock.prompts, exact.prompts)


def test_a_sequence_does_not_depend_on_those_it_comes_with(llama: Path) -> None:
    model = load_span(llama, dtype="float32")
    lengths = (300, 7, 120, 120, 1, TURN_ROWS)
    sequences, gradient = example(Span(0, 4), lengths, 64)
    together = finish(forward(model, sequences)).split(lengths)
    gradients = finish(backward(model, sequences, gradient)).hidden.split(lengths)
    for index, (rows, part) in enumerate(zip(sequences.hidden.split(lengths), gradient.split(lengths), strict=True)):
        alone = replace(sequences, lengths=(lengths[index],), hidden=rows)
        assert error(together[index], finish(forward(model, alone))) < 1e-5
        assert error(gradients[index], finish(backward(model, alone, part)).hidden) < 1e-5


def test_values_are_those_of_a_session(llama: Path) -> None:
    chain = Chain.load(llama, (4,), dtype="float32")
    tokens = list(range(5, 45))
    model = chain.stages[0].model
    sequences, _ = example(Span(0, 4), (len(tokens),), 64)
    left = finish(forward(model, replace(sequences, hidden=model.embed(torch.tensor(tokens)))))
    torch.testing.assert_close(model.logits(left), chain.all_logits(tokens), rtol=0, atol=0)


def test_the_loop_goes_on_in_its_own_mode_between_pieces(llama: Path) -> None:
    model = load_span(llama, dtype="float32")
    sequences, gradient = example(Span(0, 4), (TURN_ROWS,) * 3, 64)
    turns = 0
    for _ in backward(model, sequences, gradient):
        turns += 1
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    # Three pieces through three blocks, for the inputs of the four, and back through all four.
    assert turns == 3 * (3 + 4)


def test_what_a_block_computes_inside_is_dropped_before_the_next(llama: Path) -> None:
    model = load_span(llama, dtype="float32")
    sequences, gradient = example(Span(0, 4), (TURN_ROWS,) * 2, 64)
    alive: WeakSet[Saved] = WeakSet()
    most = 0

    def pack(tensor: torch.Tensor) -> Saved:
        nonlocal most
        saved = Saved(tensor)
        alive.add(saved)
        most = max(most, len(alive))
        return saved

    call = backward(model, sequences, gradient)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        for _ in call:
            assert not alive
    assert most > 0
