"""What came out of preparing data, and what was left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

from corolla.data.chunks import Summary
from corolla.data.layout import PARTS, Part
from corolla.data.render import RenderCounts
from corolla.data.tokens import Kind
from corolla.data.vector_packing import PackedRows


@dataclass(slots=True)
class PartMetrics:
    """One part: its articles (`rendered_tokens` long) and sequences, and their tokens by kind; ends count as completion."""

    articles: int = 0
    rendered_tokens: int = 0
    sequences: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    padding_tokens: int = 0

    def add(self, rows: PackedRows) -> None:
        """Count sequences."""
        kinds = np.bincount(rows.kinds.ravel(), minlength=len(Kind))
        self.sequences += len(rows.kinds)
        self.prompt_tokens += int(kinds[Kind.PROMPT])
        self.completion_tokens += int(kinds[Kind.COMPLETION] + kinds[Kind.END])
        self.padding_tokens += int(kinds[Kind.PADDING])

    @property
    def tokens(self) -> int:
        """All but padding."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def utilization(self) -> float:
        """The share of the sequences that is not padding, 0 to 1; 0 where there are none."""
        return self.tokens / max(1, self.tokens + self.padding_tokens)


@dataclass(slots=True)
class PackingMetrics:
    """Of a whole run. `counts` are of what was rendered, `prompt_only` of sequences that were dropped because they are all prompt."""

    parts: dict[Part, PartMetrics] = field(default_factory=lambda: {part: PartMetrics() for part in PARTS})
    counts: RenderCounts = field(default_factory=RenderCounts)
    problems: int = 0
    duplicates: int = 0
    prompt_only_sequences: int = 0
    prompt_only_tokens: int = 0

    def add(self, summary: Summary) -> None:
        """Count what was rendered."""
        counts = summary.counts
        for each in fields(counts):
            setattr(self.counts, each.name, getattr(self.counts, each.name) + getattr(counts, each.name))
        for part, articles, tokens in zip(PARTS, summary.articles, summary.tokens, strict=True):
            self.parts[part].articles += articles
            self.parts[part].rendered_tokens += tokens

    @property
    def left_out(self) -> dict[str, int]:
        """What is not in the sequences, by the reason, in tokens where they were counted."""
        counts = self.counts
        return {
            "lines_with_problems": self.problems,
            "duplicate_examples": self.duplicates,
            "truncated_articles": counts.truncated_articles,
            "truncated_tokens": counts.truncated_tokens,
            "too_short_articles": counts.too_short_articles,
            "too_short_tokens": counts.too_short_tokens,
            "too_long_articles": counts.too_long_articles,
            "too_long_tokens": counts.too_long_tokens,
            "untrained_articles": counts.untrained_articles,
            "untrained_tokens": counts.untrained_tokens,
            "prompt_only_sequences": self.prompt_only_sequences,
            "prompt_only_tokens": self.prompt_only_tokens,
        }
