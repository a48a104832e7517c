"""The decoding program of fixed shapes, run here as it is; a CUDA graph replays the same operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corolla.engine.attention import Rows
from corolla.engine.graphs import FixedDecode
from corolla.engine.work import Work
from tests.engine.driving import Chain
from tests.models import tiny


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3", "falcon-rw"])
def test_fixed_shapes_equal_the_executor(family: str, tmp_path: Path) -> None:
    chain = Chain.load(tiny.save(family, tmp_path), (4,), dtype="float32", weights="plain")
    stage = chain.stages[0]
    chain.step({0: range(5, 45), 1: range(9, 12), 2: range(50, 117)})
    program = FixedDecode(stage.model, stage.executor.cache, rows=4, pages=8)
    works = []
    for session, token in enumerate((7, 8, 9)):
        table = chain.tables[session][0]
        assert stage.pool.reserve(table, table.length + 1)
        works.append(Work(Rows(table, table.length, 1), [token], logits=1))
    program.fill(works)
    with torch.inference_mode():
        _, logits = program.run()
    expected = stage.executor.forward(works).logits
    assert logits is not None
    torch.testing.assert_close(logits[:3], expected, rtol=1e-4, atol=1e-4)
