"""Every family, whole and in spans, against stock transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corolla.errors import UnsupportedModel
from corolla.models.families import architecture
from corolla.models.reference import Reference
from tests.engine.driving import Chain, greedy
from tests.models import tiny

PROMPTS = [[5 + i % 180 for i in range(seed, seed + length)] for seed, length in [(0, 7), (11, 40), (23, 1), (31, 70)]]

CUTS = [(4,), (2, 4), (1, 3, 4), (1, 2, 3, 4)]
CUT_NAMES = ["whole", "2 spans", "3 spans", "n spans"]


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def logits_of_stock(directory: Path) -> list[torch.Tensor]:
    """For each prompt."""
    return [Reference(directory).forward(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def tokens_of_stock(directory: Path) -> list[list[int]]:
    """The 128 after each prompt."""
    reference = Reference(directory)
    return [reference.greedy(prompt, 128) for prompt in PROMPTS]


@pytest.mark.parametrize("cuts", CUTS, ids=CUT_NAMES)
def test_logits_equal_stock(directory: Path, logits_of_stock: list[torch.Tensor], cuts: tuple[int, ...]) -> None:
    chain = Chain.load(directory, cuts, dtype="float32")
    for prompt, expected in zip(PROMPTS, logits_of_stock, strict=True):
        logits = chain.all_logits(prompt)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("cuts", CUTS, ids=CUT_NAMES)
def test_128_greedy_tokens_of_packed_sessions_equal_stock(directory: Path, tokens_of_stock: list[list[int]], cuts: tuple[int, ...]) -> None:
    assert greedy(Chain.load(directory, cuts, dtype="float32"), PROMPTS, 128) == tokens_of_stock


def test_unsupported_family_is_named() -> None:
    from transformers import GPT2Config

    with pytest.raises(UnsupportedModel, match="gpt2"):
        architecture(GPT2Config())


def test_unsupported_rope_is_named() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedModel, match="dynamic"):
        architecture(config)


def test_plain_packed_agree(directory: Path) -> None:
    prompt = PROMPTS[1]
    plain = Chain.load(directory, (4,), dtype="float32", weights="plain").all_logits(prompt)
    packed = Chain.load(directory, (4,), dtype="float32").all_logits(prompt)
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
