"""transformers' own model with soft prompts, in one process: what distributed ones are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[5, 16, 27, 38, 49, 60], [7, 18, 29, 40, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
P = 3


def stock(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)


def stock_loss(model: Any, soft: torch.Tensor | None, deep: torch.Tensor | None, embeddings: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Logits and loss of the stock model, with soft tokens in front and at each block's input."""
    labels, mask, width = IDS.masked_fill(MASK == 0, -100), MASK, 0
    if soft is not None:
        width = len(soft)
        embeddings = torch.cat([soft.expand(len(embeddings), -1, -1), embeddings], 1)
        mask = torch.cat([mask.new_ones(2, width), mask], 1)
    blocks = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    hooks = []
    for index, block in enumerate(blocks):

        def enter(module: Any, args: tuple[Any, ...], index: int = index) -> tuple[Any, ...]:
            assert deep is not None
            hidden = args[0]
            return (hidden + torch.nn.functional.pad(deep[index], (0, 0, 0, hidden.shape[1] - P)), *args[1:])

        if deep is not None:
            hooks.append(block.register_forward_pre_hook(enter))
    logits = model(inputs_embeds=embeddings, attention_mask=mask).logits[:, width:]
    for hook in hooks:
        hook.remove()
    return logits, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def assert_step_equal(model: Any, reference: Any, mode: str | None) -> None:
    """Logits, loss and gradients of the inputs and of all prompts."""
    soft = deep = None
    if mode is not None:
        if model.bare.prompts.deep is not None:
            torch.nn.init.normal_(model.bare.prompts.deep)
            deep = model.bare.prompts.deep.detach().clone().requires_grad_()
        soft = model.bare.prompts.tokens.detach().clone().requires_grad_()
    embeddings = reference.get_input_embeddings()(IDS)
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    out = model(inputs_embeds=ours, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100))
    logits, loss = stock_loss(reference, soft, deep, theirs)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.logits[MASK.bool()], logits[MASK.bool()], **close)
    torch.testing.assert_close(out.loss, loss, **close)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    trained = [] if mode is None else [model.bare.prompts.tokens, *([] if deep is None else [model.bare.prompts.deep])]
    for parameter, expected in zip(trained, [soft, deep], strict=False):
        assert expected is not None
        assert parameter.grad.abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad, expected.grad, **close)
    assert [parameter for parameter in model.parameters() if parameter.requires_grad] == trained
