"""The stock BLOOM made quicker computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
from tuning.finetuning import make_model, sequence

from corolla.data.tokens import Tokens
from corolla.tuning.batches import Collator, Numbered
from corolla.tuning.bloom import keep_articles_apart, quicken
from corolla.tuning.logits_loss import trained_loss


@pytest.mark.parametrize("rows", [[sequence(7, 5, padding=4, seed=1), sequence(16, seed=2)], [sequence(16, seed=3), sequence(9, seed=4)]])
def test_logits_and_gradients_are_the_stock_modules(rows: list[Tokens]) -> None:
    stock = make_model("bloom")
    quick = copy.deepcopy(stock)
    quicken(quick)
    batch = Collator(2, wants_mask=True)([Numbered(index, row) for index, row in enumerate(rows)])
    labels, _ = batch.pop("labels"), batch.pop("sequences")
    found = []
    for model in (stock, quick):
        keep_articles_apart(model)
        logits = model(**batch, use_cache=False).logits
        trained_loss(logits, labels, smoothing=0.05).backward()
        found.append((logits.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attention_that_drops_out_and_other_families_stay_as_they_are() -> None:
    bloom = make_model("bloom")
    for block in bloom.transformer.h:
        block.self_attention.attention_dropout.p = 0.1
    llama = make_model("llama")
    before = [module.forward.__func__ for model in (bloom, llama) for module in model.modules() if "Attention" in type(module).__name__]
    for model in (bloom, llama):
        quicken(model)
    after = [module.forward.__func__ for model in (bloom, llama) for module in model.modules() if "Attention" in type(module).__name__]
    assert before == after
