"""What a client of a route does not believe, and whom it suspects where an answer stands still."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from corolla.swarm.wire import CachedFrame, FailedFrame, GapFrame, ScoresFrame, TokenFrame

_MOST_GAPS = 16  # without a token between: a server that is short of room evicts a session now and then, not again and again


def problem_of(
    frame: TokenFrame | ScoresFrame | CachedFrame | GapFrame | FailedFrame,
    *,
    from_head: bool,
    start: int,
    position: int,
    gaps: int,
    vocabulary: int | None,
) -> str | None:
    """What no honest server answers in this frame, if anything.

    Args:
        from_head: whether its sender is the last of the route.
        start: where the step began.
        position: of the next token to come.
        gaps: since the last token, this one among them.
    """
    if isinstance(frame, GapFrame):
        if frame.have > start:
            return f"it lacks what comes before {start}, and yet says that it has {frame.have}"
        return f"it lost the session {gaps} times in a row" if gaps > _MOST_GAPS else None
    if isinstance(frame, (FailedFrame, CachedFrame)):
        return None
    if not from_head:
        return "it answered a token without having the head"
    if isinstance(frame, ScoresFrame):
        beyond = frame.start + len(frame.scores) > position
        return f"it scored tokens from {frame.start} on of a history of {position}" if beyond else None
    if frame.position > position:
        return f"it answered the token at position {frame.position} before that at {position}"
    if vocabulary is not None and frame.token_id >= vocabulary:
        return f"it answered token {frame.token_id} of a vocabulary of {vocabulary}"
    return None


def suspects(peers: Sequence[str], said: Mapping[str, tuple[int, int]]) -> list[str]:
    """Where on a route an answer stands still, by the tokens cached and pending that each server says it has: at the first one that
    has less than the one before it, or at the head."""
    for before, after in pairwise(peers):
        if said[after][0] < said[before][0]:
            return [before, after]
    return [peers[-1]]
