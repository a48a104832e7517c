"""A session as an engine knows it: what it cached, what it was asked to compute, and how the answer goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corolla.engine.pages import PageTable
from corolla.types import GenerationSettings, Reply, Span

if TYPE_CHECKING:
    import torch

Deliver = Callable[[Reply], None]


@dataclass(slots=True, eq=False)
class Conversation:
    """The state of one session.

    `tokens` is the whole history as far as it is known here. For a span that embeds, what lies past the table's length is
    still to be computed; for a later span, `hidden` holds the rows [pending, hidden] that are.
    """

    session: str
    table: PageTable
    span: Span  # the blocks that it goes through here
    shares_prefixes: bool  # whether its full pages are published, and its beginning is looked for among those of others
    tokens: list[int] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    deliver: Deliver | None = None  # of the step under way; None while idle
    settings: GenerationSettings | None = None
    generation: int = 0
    sampled: int = 0  # tokens of the answer under way
    arrival: int = 0  # order of the steps under way: the earliest is served first
    used: int = 0  # the engine step it last took part in: the longest unused is evicted first

    @property
    def position(self) -> int:
        return self.table.length

    @property
    def idle(self) -> bool:
        return self.deliver is None

    @property
    def pending(self) -> int:
        """Rows still to be computed."""
        if self.hidden is not None:
            return self.hidden.shape[0]
        return max(0, len(self.tokens) - self.position)

    def payload(self, count: int) -> Sequence[int] | torch.Tensor:
        """The next `count` rows to compute."""
        if self.hidden is not None:
            return self.hidden[:count]
        return self.tokens[self.position : self.position + count]
