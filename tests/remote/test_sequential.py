"""Remote blocks as a torch module: values and gradients of the stock blocks, however they are cut and padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corolla.engine.calls import CallSequences
from corolla.errors import InvalidSetting
from corolla.messages import BackwardFrame, ForwardFrame, WireMessage
from corolla.remote.sequential import RemoteSequential
from corolla.types import Span
from tests.engine.stock import StockBlocks
from tests.remote.conftest import MakeSwarm
from tests.remote.swarm import killing

SERVERS = {"a": (0, 1), "b": (1, 3), "c": (3, 4)}
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 1, 0, 0], [1] * 7, [1, 1, 1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 1, 1, 1]],
}


def inputs(prompts: int = 3) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Hidden states, prompts, and the gradient with respect to what comes out."""
    torch.manual_seed(1)
    hidden, gradient = torch.randn(3, 7, 64), torch.randn(3, 7, 64)
    return hidden.requires_grad_(), torch.randn(4, prompts, 64).requires_grad_() if prompts else None, gradient


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("prompts", [0, 3])
def test_values_and_gradients_are_the_stock_blocks(make_swarm: MakeSwarm, directory: Path, padding: str, prompts: int) -> None:
    blocks = RemoteSequential(make_swarm(directory, SERVERS, call_rows=10).calls, Span(0, 4))
    hidden, soft, gradient = inputs(prompts)
    mask = None if MASKS[padding] is None else torch.tensor(MASKS[padding])
    kept = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask.bool()
    out = blocks(hidden, prompts=soft, attention_mask=mask)
    out.backward(gradient)

    stock = StockBlocks(directory)
    sequences = CallSequences(Span(0, 4), tuple(kept.sum(1).tolist()), hidden.detach()[kept], soft)
    torch.testing.assert_close(out[kept], stock.run(sequences), rtol=1e-5, atol=1e-5)
    assert not out[~kept].any()
    expected = stock.gradients(sequences, gradient[kept])
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[kept], expected.hidden, rtol=1e-5, atol=1e-5)
    assert not hidden.grad[~kept].any()
    if soft is not None:
        torch.testing.assert_close(soft.grad, expected.prompts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [ForwardFrame, BackwardFrame])
def test_a_servers_death_changes_no_gradient(make_swarm: MakeSwarm, directory: Path, kind: type) -> None:
    gradients = []
    for dies in (False, True):
        local = make_swarm(directory, {**SERVERS, "d": (0, 2), "e": (2, 4)})
        killed = killing(local, kind, "e") if dies else ["e"]
        hidden, soft, gradient = inputs()
        RemoteSequential(local.calls, Span(0, 4))(hidden, prompts=soft).backward(gradient)
        assert killed == ["e"]
        assert soft is not None
        gradients.append((hidden.grad, soft.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_it_is_cut_and_walked_through_like_a_list(make_swarm: MakeSwarm, directory: Path) -> None:
    blocks = RemoteSequential(make_swarm(directory, SERVERS).calls, Span(0, 4))
    hidden, _, _ = inputs()
    between = hidden
    for block in blocks:
        between = block(between)
    torch.testing.assert_close(between, blocks(hidden), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(blocks[2:](blocks[:2](hidden)), between, rtol=1e-5, atol=1e-5)
    assert [len(blocks), len(blocks[1:3]), blocks[-1].span, blocks[1:][0].span] == [4, 2, Span(3, 4), Span(1, 2)]
    with pytest.raises(IndexError):
        blocks[4]
    with pytest.raises(IndexError, match="no blocks"):
        blocks[3:3]
    with pytest.raises(InvalidSetting, match="stride"):
        blocks[::2]


def test_a_module_of_ones_own_between_two_spans_is_trained(make_swarm: MakeSwarm, directory: Path) -> None:
    blocks = RemoteSequential(make_swarm(directory, SERVERS).calls, Span(0, 4))
    own = torch.nn.Linear(64, 64)
    hidden, _, gradient = inputs()
    blocks[2:](own(blocks[:2](hidden))).backward(gradient)
    assert own.weight.grad is not None
    assert own.weight.grad.any()
    assert hidden.grad is not None
    assert hidden.grad.any()


def test_padding_is_not_sent(make_swarm: MakeSwarm, directory: Path) -> None:
    local = make_swarm(directory, SERVERS)
    sent: list[tuple[int, ...]] = []

    def before(peer: str, message: WireMessage) -> WireMessage:
        if isinstance(message, ForwardFrame):
            sent.append(message.lengths)
        return message

    local.before = before
    with torch.inference_mode():
        out = RemoteSequential(local.calls, Span(0, 4))(inputs()[0], attention_mask=torch.tensor(MASKS["left"]))
    assert sent == [(5, 7, 3)] * 3
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"hidden_SxNxE": torch.zeros(3, 64)}, "hidden"),
        ({"attention_mask": torch.ones(3, 6)}, "attention_mask"),
        ({"attention_mask": torch.zeros(3, 7)}, "has no rows"),
        ({"prompts": torch.zeros(3, 2, 64)}, "prompts"),
        ({"prompts": torch.zeros(4, 8, 64)}, "8 soft tokens"),
    ],
)
def test_what_does_not_fit_is_named(make_swarm: MakeSwarm, checkpoints: dict[str, Path], given: dict[str, torch.Tensor], word: str) -> None:
    blocks = RemoteSequential(make_swarm(checkpoints["llama"], {"a": (0, 4)}).calls, Span(0, 4))
    with pytest.raises(InvalidSetting, match=word):
        blocks(**{"hidden_SxNxE": torch.zeros(3, 7, 64), **given})
