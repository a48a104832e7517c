"""Runs one step's packed rows through a span, over the paged cache."""

from __future__ import annotations

from collections import abc
from dataclasses import replace

import torch

from corolla.engine.adapters import AdapterStore, adapting
from corolla.engine.batch import ForwardOutput, ScheduledSequence
from corolla.engine.graphs import DecodeGraphs, fits
from corolla.engine.kv_cache import KVCache
from corolla.engine.parts import Attend, paged_attention
from corolla.engine.prompts import PromptStore, deep_rows, put_in, rows_of
from corolla.engine.sequence import Sequence
from corolla.errors import AdapterNeeded, PromptNeeded
from corolla.models.span import SpanModel
from corolla.types import Span

# Rows that a batch-invariant forward always computes; prefill runs in chunks of it.
INVARIANT_ROWS = 16
# oneDNN's packed product takes 10.9 ms for a token's linears at 4 rows and 12.2 at 1 (2 cores, SmolLM2's shapes, bfloat16).
_FEWEST_PACKED_ROWS = 4


def packed_rows(count: int) -> int:
    """How many rows to compute where `count` are wanted, with packed weights.

    oneDNN compiles a kernel for each number of rows and keeps a thousand of them: with prompts of all lengths a server of two
    tiny blocks grew by 650 MB, and by 100 MB with numbers rounded up to a multiple of 8.
    """
    if count <= _FEWEST_PACKED_ROWS:
        return _FEWEST_PACKED_ROWS
    step = 8 if count <= 64 else 16
    return -(-count // step) * step


def prepare_inputs(work: ScheduledSequence, sequence: Sequence, prompts: PromptStore, adapters: AdapterStore) -> ScheduledSequence:
    """Add the adapter and the soft prompt's rows of a scheduled sequence.

    Raises `PromptNeeded` or `AdapterNeeded` where one was forgotten since the step was admitted.
    """
    name = sequence.prompt
    if name is not None and sequence.needs_prompt:
        part = prompts.find(sequence.client, name, sequence.span, with_input=sequence.puts_in)
        if part is None:
            raise PromptNeeded
        work = replace(work, prompt=rows_of(part, work.rows.start, work.rows.count))
    if sequence.adapter:
        adapter = adapters.find(sequence.adapter, sequence.span)
        if adapter is None:
            raise AdapterNeeded
        work = replace(work, adapter=adapter)
    return work


class ModelRunner:
    def __init__(self, model: SpanModel, cache: KVCache, *, batch_invariant: bool = False, attend: Attend = paged_attention) -> None:
        self.model, self.cache = model, cache
        self._attend = attend
        self._invariant = batch_invariant
        self._rounds = model.kernel_per_row_count
        self._graphs = DecodeGraphs(model, cache) if model.device.type == "cuda" and not batch_invariant else None

    @property
    def drafts_are_cheap(self) -> bool:
        """Whether a few rows of a session take about as long as one: not where steps of single rows are replayed as graphs."""
        return self._graphs is None

    @torch.inference_mode()
    def forward(self, works: abc.Sequence[ScheduledSequence], part: Span | None = None) -> ForwardOutput:
        """Compute the rows through the span or a `part` of it, and write their keys and values; the tables must hold room."""
        model = self.model
        part = part or model.span
        if self._graphs is not None and part == model.span and fits(works, embeds=model.embeds):
            return self._graphs.run(works)
        count = sum(work.rows.count for work in works)
        padded = self._padded(count)
        positions = [position for work in works for position in range(work.rows.start, work.rows.end)] + [0] * (padded - count)
        hidden = self._inputs(works, padded, part)
        attention = self._attend(model.arch, self.cache, [w.rows for w in works], padded, model.device, self._invariant)
        entering = deep_rows(works, part.start)
        adding = adapting(works, self._padded, padded, alone_alike=self._invariant)
        hidden = model.forward(hidden, torch.tensor(positions, device=model.device), attention, part, entering, adding)
        return ForwardOutput(hidden[:count], self._logits(works, hidden, part))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of rows [rows, hidden] that left the last block."""
        pieces = []
        for piece in hidden.split(INVARIANT_ROWS if self._invariant else max(1, len(hidden))):
            padding = self._padded(len(piece)) - len(piece)
            pieces.append(self.model.logits(torch.nn.functional.pad(piece, (0, 0, 0, padding)))[: len(piece)])
        return torch.cat(pieces)

    def _padded(self, count: int) -> int:
        if self._invariant:
            assert count <= INVARIANT_ROWS, "the scheduler must not pack more rows than a batch-invariant forward computes"
            return INVARIANT_ROWS
        return packed_rows(count) if self._rounds else count

    def _inputs(self, works: abc.Sequence[ScheduledSequence], padded: int, part: Span) -> torch.Tensor:
        model = self.model
        if part.start == 0 and not any(isinstance(work.payload, torch.Tensor) for work in works):
            ids = [token for work in works for token in work.payload]
            embedded = model.embed(torch.tensor(ids + [0] * (padded - len(ids))))
            put_in(model, works, embedded)
            return embedded
        rows = torch.cat([self._rows(work) for work in works])
        return torch.nn.functional.pad(rows, (0, 0, 0, padded - rows.shape[0]))

    def _rows(self, work: ScheduledSequence) -> torch.Tensor:
        if isinstance(work.payload, torch.Tensor):
            return work.payload.to(self.model.device, self.model.dtype)
        embedded = self.model.embed(torch.tensor(work.payload))
        put_in(self.model, (work,), embedded)
        return embedded

    def _logits(self, works: abc.Sequence[ScheduledSequence], hidden: torch.Tensor, part: Span) -> torch.Tensor | None:
        if part.end != self.model.arch.blocks:
            return None
        last: list[int] = []
        at = 0
        for work in works:
            at += work.rows.count
            last += range(at - work.logits, at)
        if not last:
            return None
        padding = [0] * (self._padded(len(last)) - len(last))
        return self.model.logits(hidden[torch.tensor(last + padding, device=hidden.device)])[: len(last)]
