from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corolla.errors import InvalidSetting
from corolla.models.checkpoint import Checkpoint
from corolla.models.families import architecture
from corolla.models.linear import WeightFormat
from corolla.models.span import load_span
from corolla.server.capacity import Footprint, available, footprint
from corolla.types import Span
from tests.models import tiny

TAKES = Footprint(blocks=4, block=90, cache=10, embedding=50, head=70)


def footprint_of(directory: Path, dtype: torch.dtype = torch.float32, weights: WeightFormat = "plain", cache_tokens: int = 0) -> Footprint:
    with Checkpoint(directory) as checkpoint:
        return footprint(checkpoint, architecture(checkpoint.config), dtype=dtype, weights=weights, cache_tokens=cache_tokens)


def test_a_span_takes_its_blocks_their_cache_and_the_ends_that_it_reaches() -> None:
    assert TAKES.of(Span(1, 3)) == 200
    assert TAKES.of(Span(0, 1)) == 150
    assert TAKES.of(Span(0, 4)) == 520


@pytest.mark.parametrize(("memory", "blocks"), [(520, 4), (519, 3), (370, 3), (369, 2), (170, 1), (10**9, 4)])
def test_capacity_leaves_room_for_an_end(memory: int, blocks: int) -> None:
    assert TAKES.capacity(memory) == blocks


def test_memory_for_no_block_is_refused_with_what_is_needed() -> None:
    with pytest.raises(InvalidSetting, match=r"take 1\.58e-07 GiB and there are 1\.57e-07"):
        TAKES.capacity(169)


def test_a_span_beyond_the_memory_is_refused() -> None:
    TAKES.check(Span(1, 3), 200)
    with pytest.raises(InvalidSetting, match="blocks 1:3 and their cache"):
        TAKES.check(Span(1, 3), 199)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "bloom", "gemma2", "falcon-40b", "gpt-neox"])
def test_weights_are_counted_as_they_are_loaded(family: str, tmp_path: Path) -> None:
    directory = tiny.save(family, tmp_path)
    takes = footprint_of(directory)
    assert takes.block == load_span(directory, Span(1, 2), dtype="float32", weights="plain").bytes_read
    ends = takes.embedding + takes.head
    assert takes.of(Span(0, 4)) == pytest.approx(4 * takes.block + ends)
    assert load_span(directory, dtype="float32", weights="plain").bytes_read == pytest.approx(4 * takes.block + ends, rel=0.02)


def test_formats_take_what_they_save(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path)
    plain, packed = footprint_of(directory), footprint_of(directory, weights="packed")
    half = footprint_of(directory, torch.bfloat16)
    int8, int4 = footprint_of(directory, weights="int8"), footprint_of(directory, weights="int4")
    assert packed == plain
    assert half.block * 2 == plain.block
    assert plain.block / 4 < int8.block < plain.block / 3
    assert int4.block < int8.block
    assert int4.head == int8.head


def test_weights_published_in_float16_are_kept_in_it(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path, dtype=torch.float16)
    plain, packed = footprint_of(directory), footprint_of(directory, weights="packed")
    assert packed.head * 2 == plain.head
    assert plain.block / 2 < packed.block < plain.block * 0.51


def test_the_cache_grows_with_its_positions(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path)
    assert footprint_of(directory, cache_tokens=100).cache == 100 * 2 * 2 * 16 * 4
    assert footprint_of(directory, torch.bfloat16, cache_tokens=100).cache == 100 * 2 * 2 * 16 * 2


def test_a_share_of_the_memory_is_available() -> None:
    assert 0 < available("cpu") < 2**50
