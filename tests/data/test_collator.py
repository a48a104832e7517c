"""A batch in which no article sees another: the model answers as it would to each alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from corolla.data.collator import Mask, PackedCollator
from corolla.data.dataset import item
from corolla.data.packing import PackingSettings, pack
from corolla.data.tokens import Kind, Tokens
from corolla.errors import InvalidSetting


def article(length: int, seed: int) -> Tokens:
    kinds = np.full(length, Kind.COMPLETION, np.int32)
    kinds[: length // 2], kinds[-1] = Kind.PROMPT, Kind.END
    return Tokens(np.random.default_rng(seed).integers(0, 60, length, np.int32), kinds)


ARTICLES = [article(length, seed) for seed, length in enumerate((5, 7, 1, 1, 9, 6))]
SEQUENCES = list(pack(ARTICLES, PackingSettings(max_length=16, pad_id=63)))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, attn_implementation="sdpa"
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("mask", ["positions", "block"])
def test_packed_articles_are_computed_as_each_alone(model: LlamaForCausalLM, mask: Mask) -> None:
    batch = PackedCollator(mask)([*map(item, SEQUENCES)])
    with torch.no_grad():
        packed = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        alone = [model(input_ids=torch.tensor(each.input_ids[None], dtype=torch.long)).logits[0] for each in ARTICLES]
    used = torch.tensor(np.concatenate([sequence.token_type_ids != Kind.PADDING for sequence in SEQUENCES]))
    assert torch.allclose(packed.flatten(0, 1)[used], torch.cat(alone), atol=1e-5)


def test_the_loss_is_that_of_the_articles(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        packed = model(**PackedCollator()([*map(item, SEQUENCES)])).loss
        total, count = 0.0, 0
        for each in ARTICLES:
            labels = torch.tensor(each.labels[None], dtype=torch.long)
            trained = int((labels[:, 1:] != -100).sum())
            if trained:
                total += float(model(input_ids=torch.tensor(each.input_ids[None], dtype=torch.long), labels=labels).loss) * trained
                count += trained
    assert float(packed) == pytest.approx(total / count, rel=1e-4)


def test_what_a_batch_has() -> None:
    batch = PackedCollator("block")([item(SEQUENCES[0])])
    assert batch["position_ids"].tolist() == [[*range(5), *range(7), 0, 0, 0, 1]]
    assert batch["labels"][0, [0, 5, 12, 13]].tolist() == [-100] * 4
    assert (batch["attention_mask"].dtype, batch["attention_mask"].shape) == (torch.bool, (1, 1, 16, 16))
    assert set(PackedCollator("none")([item(SEQUENCES[0])])) == {"input_ids", "labels", "use_cache"}
    with pytest.raises(InvalidSetting, match="mask: there is no 'blocks'"):
        PackedCollator("blocks")  # type: ignore[arg-type]
