"""Packed articles side by side: what is trained on, and that none sees another."""

from __future__ import annotations

import pytest
import torch
from tuning.finetuning import SHAPES, make_model, sequence

from corolla.data.tokens import IGNORED
from corolla.errors import InvalidSetting
from corolla.tuning.batches import SEQUENCES, Collator, Numbered, wants_mask


def test_labels_are_the_trained_tokens_and_never_an_articles_first() -> None:
    row = sequence(3, 4, padding=2, prompt=0)
    batch = Collator(pad_id=2)([Numbered(7, row)])
    ids = row.input_ids.tolist()
    assert batch["labels"].tolist() == [[IGNORED, ids[1], ids[2], IGNORED, ids[4], ids[5], ids[6]]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch[SEQUENCES].tolist() == [7]


def test_a_batch_is_as_long_as_its_longest_sequence_and_needs_no_mask_for_single_articles() -> None:
    batch = Collator(pad_id=9)([Numbered(0, sequence(3, padding=7)), Numbered(1, sequence(5, padding=5))])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["input_ids"][0, 3:].tolist() == [9, 9]
    assert "position_ids" not in batch
    assert "attention_mask" not in batch


@pytest.mark.parametrize("family", SHAPES)
def test_no_article_sees_another(family: str) -> None:
    model = make_model(family).eval()
    collator = Collator(pad_id=2, wants_mask=wants_mask(model))
    rows = [sequence(6, 5, 1, 4, padding=3, prompt=0, seed=1), sequence(9, 8, padding=2, seed=2)]

    def logits(*packed: object) -> torch.Tensor:
        batch = collator([Numbered(number, row) for number, row in enumerate(packed)])  # type: ignore[arg-type]
        inputs = {name: value for name, value in batch.items() if name not in ("labels", SEQUENCES)}
        with torch.no_grad():
            found: torch.Tensor = model(**inputs, use_cache=False).logits
        return found

    together = logits(*rows)
    for index, row in enumerate(rows):
        start = 0
        for length in (6, 5, 1, 4) if index == 0 else (9, 8):
            alone = logits(row[start : start + length])
            torch.testing.assert_close(together[index, start : start + length], alone[0], rtol=1e-5, atol=1e-5)
            start += length


def test_a_family_that_cannot_keep_articles_apart_is_refused() -> None:
    model = torch.nn.Module()
    model.config = type("Config", (), {"model_type": "falcon", "alibi": True})()  # type: ignore[assignment]
    with pytest.raises(InvalidSetting, match="packing=single"):
        wants_mask(model)
