"""A session as an engine knows it: what it cached, what it was asked to compute, and how the answer goes on."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corolla.engine.page_pool import PageTable
from corolla.messages import Reply
from corolla.types import GenerationSettings, PromptName, Span

if TYPE_CHECKING:
    import torch

Deliver = Callable[[Reply], None]


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one session.

    `tokens` is the whole history as far as it is known here. Where token ids come in, what lies past the table's length is
    still to be computed; where hidden states do, `hidden` holds the rows [pending, hidden] that are.

    A session is under way from a step's arrival until its last reply. On a server of a part of the model that includes the
    time between two tokens of an answer, when it waits for the next one to come round.
    """

    session: str
    table: PageTable
    span: Span  # the blocks that it goes through here
    takes_hidden: bool  # whether hidden states come in, rather than token ids
    shares_prefixes: bool  # whether its full pages are published, and its beginning is looked for among those of others
    tokens: list[int] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    deliver: Deliver | None = None  # of the step under way; None while idle
    settings: GenerationSettings | None = None
    gives_hidden: bool = False  # hidden states go out, rather than tokens
    more: bool = False  # further rows of the step are on their way
    drafts: int = 0  # so many of the pending rows are guesses, the last ones
    rejected: int = 0  # rows of the last step that were guesses, and wrong
    adapter: str = ""  # the digest of its adapter
    prompt: PromptName | None = None
    client: str = ""  # whose session and prompt that is
    unscored: torch.Tensor | None = None  # the last row [1, hidden] whose next token was not known when prompt tokens were scored
    charged: int = 0  # bytes of its client's budget, for what is still to be computed
    generation: int = 0
    sampled: int = 0  # tokens of the answer under way
    arrival: tuple[int, int] = (0, 0)  # when the answer was asked for, then the order of arrival: the earliest is served first
    used: int = 0  # the engine step it last took part in: the longest unused is evicted first
    seen: float = 0.0  # when its last message came, on the engine's clock

    @property
    def position(self) -> int:
        return self.table.length

    @property
    def idle(self) -> bool:
        return self.deliver is None

    @property
    def samples(self) -> bool:
        """Whether a token is drawn after the last pending row."""
        return self.settings is not None and not self.gives_hidden and not self.more

    @property
    def scores(self) -> bool:
        """Whether the prompt's tokens are scored, which nobody else's pages can tell."""
        return self.settings is not None and self.settings.prompt_logprobs and not self.gives_hidden and not self.sampled

    @property
    def pending(self) -> int:
        """Rows still to be computed."""
        if self.takes_hidden:
            return 0 if self.hidden is None else self.hidden.shape[0]
        return max(0, len(self.tokens) - self.position)

    @property
    def waiting(self) -> bool:
        """Under way, with nothing to compute until the next token comes round."""
        return not self.idle and not self.pending

    @property
    def needs_prompt(self) -> bool:
        """Whether the next row to compute is one that its prompt changes here."""
        name = self.prompt
        return name is not None and self.position < name.tokens and (name.deep or self.puts_in)

    @property
    def puts_in(self) -> bool:
        """Whether its prompt stands in place of embeddings here: where hidden states come in, their sender has put it in."""
        return self.span.start == 0 and not self.takes_hidden

    @property
    def history(self) -> abc.Sequence[int]:
        """Its tokens without the prompt's placeholders."""
        return self.tokens if self.prompt is None else self.tokens[self.prompt.tokens :]

    def drop_drafts(self) -> None:
        """Compute nothing that is only guessed."""
        if self.drafts:
            self.hidden = None if self.hidden is None else self.hidden[: -self.drafts]
            del self.tokens[-self.drafts :]
            self.drafts = 0

    def payload(self, count: int) -> abc.Sequence[int] | torch.Tensor:
        """The next `count` rows to compute."""
        if self.hidden is not None:
            return self.hidden[:count]
        return self.tokens[self.position : self.position + count]
