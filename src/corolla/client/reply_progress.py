"""The answers that a step gets, in their order: what is missing, what comes twice, and what cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from corolla.client.reply_validation import MOST_GAPS, Asked, problem_of
from corolla.messages import Gap, Scores, Token

ContentFrame = Token | Scores | Gap

_TOKENS_FOR_A_GAP = 4  # that make up for one
_STEADY = 64  # tokens, after which older setbacks say nothing any more


@dataclass(slots=True)
class ReplyProgress:
    """Of the steps along one route."""

    asked: Asked | None = None  # by the step under way
    position: int = 0  # of the next token to come
    scored: int = 0  # of the next score to come
    gaps: float = 0.0  # less what tokens have made up for
    setbacks: int = 0  # answers that got lost, until enough tokens have come since
    _steady: int = 0

    def begin(self, asked: Asked) -> None:
        """A step is sent."""
        self.asked, self.position, self.scored = asked, asked.end, asked.start + 1

    def problem_of(self, frame: ContentFrame, *, from_head: bool) -> str | None:
        """What no honest server answers in this frame, if anything."""
        assert self.asked is not None, "an answer is looked at that no step asked for"
        self.gaps += isinstance(frame, Gap)
        return problem_of(frame, self.asked, from_head=from_head, position=self.position, gaps=self.gaps)

    def keeps_back(self, frame: ContentFrame) -> bool:
        """Whether a gap is one too many: the server before the one that tells of it may keep back what it lacks."""
        return isinstance(frame, Gap) and self.gaps > MOST_GAPS

    def within_step(self, gap: Gap) -> Gap:
        """The gap, from where the step begins where it is behind that."""
        assert self.asked is not None, "a gap is looked at that no step met"
        return msgspec.structs.replace(gap, have=min(gap.have, self.asked.start))

    def is_repeated(self, frame: ContentFrame) -> bool:
        if isinstance(frame, Token):
            return frame.position < self.position
        return isinstance(frame, Scores) and frame.start + len(frame.scores) <= self.scored

    def is_ahead(self, frame: ContentFrame) -> bool:
        """Whether answers before this one got lost on their way, or were never sent."""
        if isinstance(frame, Token):
            return frame.position > self.position or (self._wants_scores and self.scored < self.position)
        return isinstance(frame, Scores) and frame.start > self.scored

    def get_on(self, frame: Token | Scores) -> None:
        """The next answer is there: the only thing that makes up for what went wrong."""
        if isinstance(frame, Scores):
            self.scored = frame.start + len(frame.scores)
            return
        self.position += 1
        self.gaps = max(0.0, self.gaps - 1 / _TOKENS_FOR_A_GAP)
        self._steady += 1
        if self._steady >= _STEADY:
            self.setbacks = 0

    def set_back(self) -> int:
        """Answers got lost. Returns how often they did lately."""
        self.setbacks, self._steady = self.setbacks + 1, 0
        return self.setbacks

    @property
    def _wants_scores(self) -> bool:
        """Whether scores of the prompt have to come before the token that does."""
        asked = self.asked
        return asked is not None and asked.settings is not None and asked.settings.prompt_logprobs and self.position == asked.end
