"""Attention's quick ways against the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from corolla.engine.attention import CHUNK_KEYS, LONG_KEYS, alibi_slopes, attend, attend_pieces
from corolla.models.families import architecture
from corolla.models.reference import Reference
from corolla.models.span import load_span
from tests.engine.driving import Chain
from tests.models import tiny


@pytest.mark.parametrize("lengths", [(LONG_KEYS,), (LONG_KEYS + 1, 3), (CHUNK_KEYS - 1, 5 * CHUNK_KEYS, 1), (1, 1)])
def test_keys_in_pieces_equal_keys_in_one(lengths: tuple[int, ...], tmp_path: Path) -> None:
    arch = load_span(tiny.save("llama", tmp_path), dtype="float32").arch
    query = torch.randn(1, arch.kv_heads, arch.group, arch.head_dim)
    pool = torch.randn(2 * arch.kv_heads, sum(lengths) + 100, arch.head_dim)
    pieces = [piece.split(arch.kv_heads) for piece in pool[:, 7 : 7 + sum(lengths)].split(lengths, dim=1)]
    key, value = pool[:, 7 : 7 + sum(lengths)].split(arch.kv_heads)
    torch.testing.assert_close(attend_pieces(arch, query, pieces), attend(arch, query, key[None], value[None], None)[0])


@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_a_long_session_in_scattered_pages_equals_stock(family: str, tmp_path: Path) -> None:
    directory = tiny.save(family, tmp_path, max_position_embeddings=4096)
    tokens = [3 + i * 7 % 190 for i in range(LONG_KEYS + 60)]
    chain = Chain.load(directory, (4,), dtype="float32")
    chain.step(dict.fromkeys(range(5), tokens[:100]))
    for start in range(100, len(tokens) - 2, 160):  # two of them grow in turn, between the others
        for session in (0, 1):
            logits = chain.step({session: tokens[start : min(start + 160, len(tokens) - 2)]})
    assert any(chain.tables[session][0].first_slot_if_contiguous is None for session in (0, 1))
    expected = Reference(directory).forward(tokens)[-2:]
    for session in (0, 1):
        for token, row in zip(tokens[-2:], expected, strict=True):
            logits = chain.step({session: [token]})
            torch.testing.assert_close(logits[session], row, rtol=1e-4, atol=1e-5 * float(row.abs().max()))


def test_softcap_in_one_piece_equals_row_by_row() -> None:
    model_type, settings = tiny.CONFIGS["gemma2"]
    arch = architecture(AutoConfig.for_model(model_type, **settings))
    assert arch.attention_softcap
    query, key, value = (torch.randn(1, heads, 9, arch.head_dim) for heads in (arch.heads, arch.kv_heads, arch.kv_heads))
    whole = attend(arch, query, key, value, None, causal=True)
    rows = [attend(arch, query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], None) for i in range(9)]
    torch.testing.assert_close(whole, torch.cat(rows, 2))


@pytest.mark.parametrize("heads", [8, 12, 16, 71])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    expected = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads, torch.device("cpu")), expected)
