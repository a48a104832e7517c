"""Drives model runners by hand: spans in a row, without an engine's loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from corolla.engine.attention import SequenceRows
from corolla.engine.batch import ScheduledSequence
from corolla.engine.kv_cache import KVCache
from corolla.engine.model_runner import ModelRunner
from corolla.engine.page_pool import PagePool, PageTable
from corolla.models.linear import WeightFormat
from corolla.models.span import SpanModel, load_span
from corolla.types import Span

PAGES, PAGE_SIZE = 160, 16


@dataclass
class Stage:
    model: SpanModel
    pool: PagePool
    runner: ModelRunner


class Chain:
    """The spans of one model, each with its cache; sessions are their index."""

    def __init__(self, models: Sequence[SpanModel], *, batch_invariant: bool = False) -> None:
        self.stages = []
        for model in models:
            cache = KVCache(model.arch, model.span, PAGES * PAGE_SIZE, PAGE_SIZE, model.dtype, model.device)
            self.stages.append(Stage(model, PagePool(PAGES, PAGE_SIZE), ModelRunner(model, cache, batch_invariant=batch_invariant)))
        self.tables: dict[int, list[PageTable]] = {}

    @classmethod
    def load(
        cls,
        directory: Path,
        cuts: Sequence[int],
        *,
        dtype: str,
        weights: WeightFormat = "packed",
        batch_invariant: bool = False,
        device: str = "cpu",
    ) -> Chain:
        spans = [Span(start, end) for start, end in zip((0, *cuts), cuts, strict=False)]
        models = [load_span(directory, span, dtype=dtype, weights=weights, device=device) for span in spans]
        return cls(models, batch_invariant=batch_invariant)

    def step(self, sessions: dict[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """The logits [vocabulary] after each session's new tokens."""
        payloads: dict[int, Sequence[int] | torch.Tensor] = dict(sessions)
        for index, stage in enumerate(self.stages):
            works = []
            for session, payload in payloads.items():
                tables = self.tables.setdefault(session, [s.pool.open() for s in self.stages])
                table = tables[index]
                assert stage.pool.reserve(table, table.length + len(payload))
                works.append(ScheduledSequence(SequenceRows(table, table.length, len(payload)), payload, logits=1))
            computed = stage.runner.forward(works)
            for work in works:
                stage.pool.advance(work.rows.table, work.rows.count)
            parts = computed.hidden.split([len(p) for p in payloads.values()])
            payloads = dict(zip(payloads, parts, strict=True))
        assert computed.logits is not None
        return dict(zip(payloads, computed.logits, strict=True))

    def all_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of one piece of a new session."""
        self.tables.clear()
        self.stages = [Stage(s.model, PagePool(PAGES, PAGE_SIZE), s.runner) for s in self.stages]
        payload: Sequence[int] | torch.Tensor = tokens
        for stage in self.stages:
            table = stage.pool.open()
            assert stage.pool.reserve(table, len(tokens))
            payload = stage.runner.forward([ScheduledSequence(SequenceRows(table, 0, len(tokens)), payload, logits=0)]).hidden
        assert isinstance(payload, torch.Tensor)
        with torch.inference_mode():
            return self.stages[-1].model.logits(payload)


def greedy(chain: Chain, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The `count` most likely tokens after each prompt, all sessions in every step."""
    logits = chain.step(dict(enumerate(prompts)))
    answers = [[int(logits[i].argmax())] for i in range(len(prompts))]
    for _ in range(count - 1):
        logits = chain.step({i: answer[-1:] for i, answer in enumerate(answers)})
        for i, answer in enumerate(answers):
            answer.append(int(logits[i].argmax()))
    return answers
