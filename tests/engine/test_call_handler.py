"""Calls as they travel: what a forward leaves for its backward, and prompts that came before."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from corolla.engine.activations import ActivationLimits, ActivationStore
from corolla.engine.call_handler import CallHandler
from corolla.engine.calls import backward
from corolla.engine.prompts import PromptStore
from corolla.errors import ActivationsGone, InvalidSetting, PromptNeeded
from corolla.models.span import SpanModel, load_span
from corolla.types import Call, PromptName, PromptPart, Span
from tests.engine.stock import example, finish
from tests.models import tiny

WHOLE, LENGTHS, P = Span(0, 4), (9, 4, 300), 3
NAME = PromptName("p", P, deep=True)


@pytest.fixture(scope="module", params=["llama", "bloom"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    return load_span(tiny.save(request.param, tmp_path_factory.mktemp(request.param)), dtype="float32")


def call(number: int, *, back: bool = False, keep: bool = False, kept: int = 0, prompt: PromptName | None = None) -> Call:
    return Call(client="c", number=number, span=WHOLE, lengths=LENGTHS, back=back, keep=keep, kept=kept, prompt=prompt)


@pytest.mark.parametrize("prompts", [0, P])
def test_a_kept_forward_gives_the_gradients_of_a_second_one(model: SpanModel, prompts: int) -> None:
    sequences, gradient = example(WHOLE, LENGTHS, 64, prompts)
    expected = finish(backward(model, sequences, gradient))
    store = PromptStore(model)
    answering, name = CallHandler(model, store), NAME if prompts else None
    if sequences.prompts is not None:
        store.put("c", PromptPart(NAME, WHOLE, deep=sequences.prompts))
    out = finish(answering.answer(call(1, keep=True, prompt=name), sequences.hidden))
    again = finish(answering.answer(call(2, prompt=name), sequences.hidden))
    torch.testing.assert_close(out, again, rtol=1e-5, atol=1e-5)
    assert answering.kept.size > sequences.hidden.nbytes
    rows = finish(answering.answer(call(3, back=True, kept=1, prompt=name), gradient))
    torch.testing.assert_close(rows[: sum(LENGTHS)], expected.hidden, rtol=1e-5, atol=1e-5)
    if expected.prompts is not None:
        torch.testing.assert_close(rows[sum(LENGTHS) :].view(4, P, 64), expected.prompts, rtol=1e-5, atol=1e-5)
    assert len(answering.kept) == 0
    with pytest.raises(ActivationsGone):
        finish(answering.answer(call(4, back=True, kept=1, prompt=name), gradient))


def test_without_room_nothing_is_kept(model: SpanModel) -> None:
    answering = CallHandler(model, PromptStore(model))
    answering.kept = ActivationStore(ActivationLimits(size=1000))
    sequences, gradient = example(WHOLE, LENGTHS, 64, 0)
    out = finish(answering.answer(call(1, keep=True), sequences.hidden))
    torch.testing.assert_close(out, finish(answering.answer(call(2), sequences.hidden)), rtol=1e-5, atol=1e-5)
    assert len(answering.kept) == 0
    with pytest.raises(ActivationsGone):
        finish(answering.answer(call(3, back=True, kept=1), gradient))


def test_what_is_kept_is_forgotten_in_time_and_with_its_client(model: SpanModel) -> None:
    sequences, _ = example(WHOLE, LENGTHS, 64, 0)
    for limits in (ActivationLimits(seconds=0.0), ActivationLimits()):
        answering = CallHandler(model, PromptStore(model))
        answering.kept = ActivationStore(limits)
        finish(answering.answer(call(1, keep=True), sequences.hidden))
        answering.kept.lose("another")
        assert len(answering.kept) == 1
        if limits.seconds:
            answering.kept.lose("c")
        with pytest.raises(ActivationsGone):
            answering.kept.take("c", 1)


def test_what_is_forgotten_takes_no_memory(model: SpanModel) -> None:
    """A graph that holds what holds the graph is freed by nobody."""
    answering = CallHandler(model, PromptStore(model))
    sequences, _ = example(WHOLE, LENGTHS, 64, 0)
    finish(answering.answer(call(1, keep=True), sequences.hidden))
    activations = answering.kept.take("c", 1)
    assert activations.size > sequences.hidden.nbytes
    (_, [(_, left), *_]), *_ = activations.blocks
    graph = weakref.ref(left)
    del activations, left
    gc.collect()
    assert graph() is None


def test_another_calls_lengths_are_refused(model: SpanModel) -> None:
    answering = CallHandler(model, PromptStore(model))
    sequences, gradient = example(WHOLE, LENGTHS, 64, 0)
    finish(answering.answer(call(1, keep=True), sequences.hidden))
    other = Call(client="c", number=2, span=WHOLE, lengths=(313,), back=True, kept=1)
    with pytest.raises(ActivationsGone):
        finish(answering.answer(other, gradient))


def test_prompts_that_did_not_come_and_values_that_are_none(model: SpanModel) -> None:
    answering = CallHandler(model, PromptStore(model))
    sequences, _ = example(WHOLE, LENGTHS, 64, 0)
    with pytest.raises(PromptNeeded):
        finish(answering.answer(call(1, prompt=NAME), sequences.hidden))
    with pytest.raises(InvalidSetting, match="NaN"):
        finish(answering.answer(call(1), torch.full_like(sequences.hidden, float("nan"))))


def test_widened_weights_are_not_kept(tmp_path: Path) -> None:
    model = load_span(tiny.save("llama", tmp_path), dtype="float32")
    answering = CallHandler(model, PromptStore(model))
    sequences, _ = example(WHOLE, LENGTHS, 64, 0)
    finish(answering.answer(call(1, keep=True), sequences.hidden))
    blocks = [block for block, _ in answering.kept.take("c", 1).blocks]
    assert all(linear._weight is None for block in blocks for linear in block.linears)  # type: ignore[attr-defined]


@pytest.mark.parametrize("room", [True, False])
def test_widened_weights_stay_while_backwards_are_to_come_and_there_is_room(model: SpanModel, room: bool) -> None:
    answering = CallHandler(model, PromptStore(model))
    sequences, gradient = example(WHOLE, LENGTHS, 64, 0)
    expected = finish(backward(model, sequences, gradient))
    for number in (1, 2, 3):
        finish(answering.answer(call(number, keep=True), sequences.hidden))
    if not room:
        answering.kept.limits = ActivationLimits(size=1)
    held = []
    for number in (1, 2, 3):
        rows = finish(answering.answer(call(9, back=True, kept=number), gradient))
        torch.testing.assert_close(rows, expected.hidden, rtol=1e-5, atol=1e-5)
        held.append(answering.kept.widened > 0)
    assert held == [room, room, False]
    answering.kept.limits = ActivationLimits()
    for number in (4, 5):
        finish(answering.answer(call(number, keep=True), sequences.hidden))
    finish(answering.answer(call(9, back=True, kept=4), gradient))
    answering.kept.lose("c")
    assert answering.kept.widened == 0


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("others", [0, 1])
def test_a_backward_that_is_dropped_leaves_no_weights_widened(model: SpanModel, pieces: int, others: int) -> None:
    answering = CallHandler(model, PromptStore(model))
    sequences, gradient = example(WHOLE, LENGTHS, 64, 0)
    for number in range(1 + others):
        finish(answering.answer(call(number + 1, keep=True), sequences.hidden))
    blocks = [block for block, _ in answering.kept._kept["c", 1].blocks]
    under_way = answering.answer(call(9, back=True, kept=1), gradient)
    for _ in range(pieces):
        next(under_way)
    under_way.close()  # what a server does with the calls of a client that is gone
    answering.kept.lose("c")
    assert answering.kept.widened == 0
    assert all(linear._weight is None for block in blocks for linear in block.linears)  # type: ignore[attr-defined]
