"""Decoding as a program of fixed shapes, so that a CUDA graph can replay it without a launch an operation.

Legend: R rows (sessions), W pages of each, E hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from corolla.engine.attention import Gathered, PagedAttention
from corolla.engine.batch import ForwardOutput, ScheduledSequence
from corolla.engine.kv_cache import KVCache
from corolla.models.span import SpanModel

MOST_ROWS = 64


def fits(works: Sequence[ScheduledSequence], *, embeds: bool) -> bool:
    """Whether a step is one that graphs are kept for: decoding only, from token ids where the span `embeds`, else from hidden states."""
    return len(works) <= MOST_ROWS and all(
        work.rows.count == 1 and work.prompt is None and work.adapter is None and isinstance(work.payload, torch.Tensor) != embeds
        for work in works
    )


class FixedDecode:
    """One decoding row for each of up to R sessions of up to W pages: inputs are copied in, and the same operations run on them.

    Rows that no session uses compute from zeros and write to the cache's spare slot.
    """

    def __init__(self, model: SpanModel, cache: KVCache, rows: int, pages: int) -> None:
        self.model, self.cache = model, cache
        device = model.device
        self._ids_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._inputs_RxE = torch.zeros(rows, model.arch.hidden, dtype=model.dtype, device=device)
        self._positions_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._slots_R = torch.full((rows,), cache.spare_slot, dtype=torch.int64, device=device)
        self._pages_RxW = torch.zeros(rows, pages, dtype=torch.int64, device=device)

    def fill(self, works: Sequence[ScheduledSequence]) -> None:
        """Copy a step's inputs into place."""
        rows, width = self._pages_RxW.shape
        unused = rows - len(works)
        tables = [work.rows.table for work in works]
        slots = [slot for work in works for slot in work.rows.table.slots(work.rows.start, work.rows.end)]
        self._positions_R.copy_(torch.tensor([work.rows.start for work in works] + [0] * unused))
        self._slots_R.copy_(torch.tensor(slots + [self.cache.spare_slot] * unused))
        self._pages_RxW.copy_(torch.tensor([(table.pages + [0] * width)[:width] for table in tables] + [[0] * width] * unused))
        if self.model.embeds:
            self._ids_R.copy_(torch.tensor([token for w in works for token in w.payload] + [0] * unused))
        else:
            self._inputs_RxE[: len(works)] = torch.cat([w.payload for w in works]).to(self._inputs_RxE)  # type: ignore[misc]

    def run(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [R, E] and, where the span heads, logits [R, V]."""
        model = self.model
        rows = self._slots_R.shape[0]
        hidden = model.embed(self._ids_R) if model.embeds else self._inputs_RxE
        everyone = Gathered(model.arch, self.cache.page_size, slice(0, rows), self._pages_RxW, self._positions_R)
        attention = PagedAttention(model.arch, self.cache, self._slots_R, [everyone], rows)
        hidden = model.forward(hidden, self._positions_R, attention)
        return hidden, model.logits(hidden) if model.heads else None


class DecodeGraphs:
    """CUDA graphs of `FixedDecode` on the model's device, captured as they are first needed, for rows and pages rounded up to powers
    of two.

    `cuda` is `torch.cuda`, or what a test has in its place.
    """

    def __init__(self, model: SpanModel, cache: KVCache, cuda: Any = torch.cuda) -> None:
        self._model, self._cache, self._cuda = model, cache, cuda
        self._captured: dict[tuple[int, int], tuple[FixedDecode, Any, tuple[torch.Tensor, torch.Tensor | None]]] = {}

    def run(self, works: Sequence[ScheduledSequence]) -> ForwardOutput:
        rows = _power_of_two(len(works))
        pages = _power_of_two(max(-(-w.rows.end // self._cache.page_size) for w in works))
        with self._cuda.device(self._model.device):
            program, graph, (hidden, logits) = self._captured.get((rows, pages)) or self._capture(rows, pages)
            program.fill(works)
            graph.replay()
        wanted = [i for i, work in enumerate(works) if work.logits]
        return ForwardOutput(hidden[: len(works)].clone(), logits[wanted] if logits is not None and wanted else None)

    def _capture(self, rows: int, pages: int) -> tuple[FixedDecode, Any, tuple[torch.Tensor, torch.Tensor | None]]:
        cuda, device = self._cuda, self._model.device
        program = FixedDecode(self._model, self._cache, rows, pages)
        stream = cuda.Stream(device)
        stream.wait_stream(cuda.current_stream(device))
        with cuda.stream(stream):  # libraries set themselves up, and tables are made, outside the capture
            for _ in range(2):
                program.run()
        cuda.current_stream(device).wait_stream(stream)
        graph = cuda.CUDAGraph()
        # What other threads copy meanwhile does not concern the capture; torch's own stream for captures is on the first device.
        with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = program.run()
        self._captured[rows, pages] = program, graph, outputs
        return self._captured[rows, pages]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
