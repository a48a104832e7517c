"""The decoding program of fixed shapes, run here as it is; a CUDA graph replays the same operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corolla.engine.attention import SequenceRows
from corolla.engine.batch import ScheduledSequence
from corolla.engine.graphs import DecodeGraphs, FixedDecode
from tests.engine.driving import Chain
from tests.models import tiny


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3", "falcon-rw"])
def test_fixed_shapes_equal_the_model_runner(family: str, tmp_path: Path) -> None:
    chain = Chain.load(tiny.save(family, tmp_path), (4,), dtype="float32", weights="plain")
    stage = chain.stages[0]
    chain.step({0: range(5, 45), 1: range(9, 12), 2: range(50, 117)})
    program = FixedDecode(stage.model, stage.runner.cache, rows=4, pages=8)
    works = []
    for session, token in enumerate((7, 8, 9)):
        table = chain.tables[session][0]
        assert stage.pool.reserve(table, table.length + 1)
        works.append(ScheduledSequence(SequenceRows(table, table.length, 1), [token], logits=1))
    program.fill(works)
    with torch.inference_mode():
        _, logits = program.run()
    expected = stage.runner.forward(works).logits
    assert logits is not None
    torch.testing.assert_close(logits[:3], expected, rtol=1e-4, atol=1e-4)


class _NoCopies(TorchDispatchMode):
    """Fails where Python's numbers become a tensor: on a GPU that is a copy, which cannot be captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default, "a table was made within the capture"
        return func(*args, **(kwargs or {}))


class Cuda:
    """In the place of `torch.cuda`: tells on which device it is used, and by what; graphs compute nothing again."""

    class CUDAGraph:
        def replay(self) -> None: ...

    def __init__(self) -> None:
        self.used: list[object] = []
        self.modes: list[str] = []

    def device(self, device: object) -> Any:
        self.used.append(device)
        return nullcontext()

    def Stream(self, device: object) -> Any:  # as torch names it
        self.used.append(device)
        return self

    def current_stream(self, device: object) -> Any:
        self.used.append(device)
        return self

    def wait_stream(self, other: object) -> None: ...

    def stream(self, stream: object) -> Any:
        return nullcontext()

    @contextmanager
    def graph(self, graph: object, *, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert stream is self
        self.modes.append(capture_error_mode)
        with _NoCopies():
            yield


@pytest.mark.parametrize("weights", ["plain", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "falcon-rw"])
def test_a_graph_is_captured_on_the_models_device_and_copies_nothing_to_it(family: str, weights: Any, tmp_path: Path) -> None:
    chain = Chain.load(tiny.save(family, tmp_path), (4,), dtype="float32", weights=weights)
    stage, cuda = chain.stages[0], Cuda()
    chain.step({0: range(5, 45)})
    table = chain.tables[0][0]
    assert stage.pool.reserve(table, table.length + 1)
    graphs = DecodeGraphs(stage.model, stage.runner.cache, cuda)
    with torch.inference_mode():
        for _ in range(2):
            graphs.run([ScheduledSequence(SequenceRows(table, table.length, 1), [7], logits=1)])
    assert set(cuda.used) == {stage.model.device}
    assert cuda.modes == ["thread_local"]
