"""Speculative drafts: guesses of the tokens that follow, computed in the same step as the token they follow.

Prompt lookup decoding (Saxena, 2023): what followed when the last two tokens came before is guessed to follow again. The guesses
are verified after Leviathan et al. (2023), by equality: each place's token is sampled as it would be without guesses, from
(seed, position), and a guess is kept as far as it is that token. So an answer's tokens do not depend on what was guessed, and a
step, whose forward of a few rows takes about as long as one of a single row, gives up to `1 + drafts` of them.
"""

from __future__ import annotations

from array import array
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from corolla.engine.batch import ScheduledSequence
from corolla.engine.sampler import Sampled, SampleRequest, sample
from corolla.engine.sequence import Sequence

Sample = Callable[[torch.Tensor, abc.Sequence[SampleRequest]], list[Sampled | None]]
"""`sampler.sample`."""
Guess = Callable[[abc.Sequence[int], int, int], tuple[int, ...]]
"""Tokens that may follow a history and the token after it, and how many of them at most."""

_BACK = 4096  # tokens that are looked through: a tenth of a millisecond
_PAIR = 2


def guess(history: abc.Sequence[int], token: int, most: int) -> tuple[int, ...]:
    """Up to `most` tokens that may follow `history` and `token`; none where no two tokens like the last two stand earlier."""
    recent = [*history[-_BACK:], token]
    coded = array("q", recent)
    size, searched = coded.itemsize, coded.tobytes()
    last = searched[-_PAIR * size :]
    at = searched.rfind(last, 0, len(searched) - size)
    while at > 0 and at % size:  # across the bytes of three tokens
        at = searched.rfind(last, 0, at + len(last) - 1)
    if at < 0:
        return ()
    follows = at // size + _PAIR
    return tuple(recent[follows : follows + most])


@dataclass(slots=True, eq=False)
class _Verified:
    """A session's rows [1 + drafts] of logits from row `at` on, and the tokens that are certain so far."""

    sequence: Sequence
    work: ScheduledSequence
    at: int
    sampled: list[Sampled] = field(default_factory=list)
    damaged: bool = False  # a row came that nothing can be drawn from

    @property
    def request(self) -> SampleRequest:
        """For the first row that nothing is sampled from yet."""
        sequence, later = self.sequence, self.work.logits - 1 - len(self.sampled)
        history = sequence.history
        assert sequence.settings is not None, "a token is sampled for a step without settings"
        return SampleRequest(sequence.settings, self.work.rows.end - later, history[: len(history) - later] if later else history)

    @property
    def goes_on(self) -> bool:
        """Whether the next row follows on what was sampled."""
        if self.damaged or len(self.sampled) == self.work.logits:
            return False
        guessed = self.sequence.tokens[self.work.rows.end - self.work.logits + len(self.sampled)]
        return guessed == self.sampled[-1].token_id


def verified(
    scheduled: abc.Sequence[tuple[Sequence, ScheduledSequence]], logits: torch.Tensor | None, sample: Sample = sample
) -> list[list[Sampled] | None]:
    """What each of the works that want logits gives: one token, and another for each guess that turned out right. None where
    a row has NaN or infinity, from which nothing can be drawn.

    `logits` [rows, vocabulary] has the rows that they want, one work's behind another's.
    """
    everyone, at = [], 0
    for sequence, work in scheduled:
        if work.logits:
            everyone.append(_Verified(sequence, work, at))
            at += work.logits
    going = everyone
    while going and logits is not None:
        rows = torch.tensor([each.at + len(each.sampled) for each in going], device=logits.device)
        drawn = sample(logits[rows] if len(rows) < len(logits) else logits, [each.request for each in going])
        for each, sampled in zip(going, drawn, strict=True):
            if sampled is None:
                each.damaged = True
            else:
                each.sampled.append(sampled)
        going = [each for each in going if each.goes_on]
    return [None if each.damaged else each.sampled for each in everyone]
