"""The log-probabilities of a prompt's own tokens, as they are computed."""

from __future__ import annotations

import torch

from corolla.engine.batch import ScheduledSequence
from corolla.engine.model_runner import ModelRunner
from corolla.engine.sampler import score
from corolla.engine.sequence import Sequence
from corolla.messages import Scores

_AT_ONCE = 64  # tokens of one reply: with 20 alternatives each they fit a frame


def scores_of(
    runner: ModelRunner, sequence: Sequence, work: ScheduledSequence, hidden: torch.Tensor
) -> tuple[list[Scores], torch.Tensor | None]:
    """The scores that the rows `hidden` [count, hidden] of a session give, which left the last block, and its next `unscored` row.

    A row tells about the token after it. Where that is not known yet, for it comes with the next chunk, the row is kept until then.
    Raises `ServerFault` for rows that are not finite.
    """
    start = work.rows.start
    if sequence.unscored is not None:
        hidden, start = torch.cat([sequence.unscored, hidden]), start - 1
    following = sequence.tokens[start + 1 : work.rows.end + 1]
    unscored = hidden[-1:].clone() if len(following) < len(hidden) else None
    assert sequence.settings is not None, "scores are computed that nobody asked for"
    top, replies = sequence.settings.top_logprobs, []
    for at in range(0, len(following), _AT_ONCE):
        tokens = following[at : at + _AT_ONCE]
        scores = score(runner.logits(hidden[at : at + len(tokens)]), tokens, top)
        replies.append(Scores(sequence.session, sequence.generation, start + 1 + at, tuple(scores)))
    return replies, unscored
