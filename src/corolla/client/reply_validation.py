"""What a client of a route does not believe, and whom it suspects where an answer stands still."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from corolla.errors import (
    ActivationsGone,
    AdapterNeeded,
    Busy,
    CapacityError,
    CorollaError,
    EmptyPrompt,
    InvalidSetting,
    NetworkError,
    PromptNeeded,
    PromptTooLong,
    ProtocolError,
    ServerFault,
)
from corolla.messages import Cached, FailedFrame, Gap, Score, Scores, Token
from corolla.types import FinishReason, GenerationSettings

ReplyFrame = Token | Scores | Cached | Gap | FailedFrame

MOST_GAPS = 16  # a server that is short of room evicts a session now and then, not again and again
_MOST_TOKENS = 2**31  # of a vocabulary that is not known
_LONGEST_TEXT = 400  # characters of what a server says
# What a server may answer to a step or a call. Unauthorized, for one, is none of them: it speaks of who brought the step.
_FROM_SERVERS = frozenset(
    {
        ActivationsGone,
        AdapterNeeded,
        Busy,
        CapacityError,
        EmptyPrompt,
        InvalidSetting,
        NetworkError,
        PromptNeeded,
        PromptTooLong,
        ProtocolError,
        ServerFault,
    }
)


def believed(error: CorollaError) -> CorollaError:
    """An error as a server may raise it, its text made fit to be shown.

    One of a kind that no server raises is a `ServerFault` of the server that sent it.
    """
    text = shown(str(error))
    if type(error) not in _FROM_SERVERS:
        return ServerFault(f"a server answered with {type(error).__name__}, which no server raises: {text}")
    error.args = (f"a server said: {text}",)
    if isinstance(error, InvalidSetting):
        error.setting = shown(error.setting)
    return error


def shown(text: str) -> str:
    """What a stranger wrote, as one line of bounded length without characters that control a terminal or hide text."""
    plain = "".join(" " if unicodedata.category(character) in _HIDDEN else character for character in text[: 4 * _LONGEST_TEXT])
    line = " ".join(plain.split())
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 1] + "…"


_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


@dataclass(frozen=True, slots=True)
class Asked:
    """What a step asks for.

    Args:
        start: its first token's position.
        end: the position of the answer's first token.
        settings: how it goes on; None asks for no token.
        vocabulary: of the model; None where it is not known.
        timed: the servers whose timings come with each token.
    """

    start: int
    end: int
    settings: GenerationSettings | None
    vocabulary: int | None
    timed: Collection[str] = ()

    @property
    def most(self) -> int:
        """Positions that the history and the whole answer take."""
        return self.end + (0 if self.settings is None else self.settings.max_tokens_to_generate)


def problem_of(frame: ReplyFrame, asked: Asked, *, from_head: bool, position: int, gaps: float) -> str | None:
    """What no honest server answers in this frame, if anything.

    Args:
        from_head: whether its sender is the last of the route.
        position: of the next token to come.
        gaps: answered lately, this one among them.
    """
    if isinstance(frame, Gap):
        if frame.have >= asked.most:
            return f"it lacks rows, and yet says that it has {frame.have}, of {asked.most} that there can be"
        return f"it lost the session again and again, {MOST_GAPS} times with hardly a token between" if gaps > MOST_GAPS else None
    if isinstance(frame, (FailedFrame, Cached)):
        return None
    if not from_head:
        return "it answered a token without having the head"
    settings = asked.settings
    if isinstance(frame, Scores):
        if settings is None or not settings.prompt_logprobs:
            return "it scored tokens of a prompt, which nobody asked for"
        if frame.start <= asked.start or frame.start + len(frame.scores) > position or not frame.scores:
            return f"it scored tokens from {frame.start} on of a history from {asked.start} to {position}"
        return next(
            filter(None, (_problem_of_logprobs(score, settings, asked.vocabulary) for score in frame.scores)),
            None,
        )
    if settings is None:
        return "it answered a token that nobody asked for"
    last = asked.most - 1
    if frame.position > last or (frame.position == last and frame.finish is None):
        return f"it goes on after {settings.max_tokens_to_generate} tokens, which were all that was asked for"
    if frame.token_id >= (asked.vocabulary or _MOST_TOKENS):
        return f"it answered token {frame.token_id} of a vocabulary of {asked.vocabulary}"
    if (frame.finish is FinishReason.STOP) != (frame.token_id in settings.stop_token_ids):
        return f"it answered token {frame.token_id} and {'ended' if frame.finish else 'did not end'} the answer there"
    if not all(timing.peer in asked.timed for timing in frame.timings):
        return "it answered timings that nobody asked for"
    return _problem_of_logprobs(frame, settings, asked.vocabulary)


def _problem_of_logprobs(scored: Score | Token, settings: GenerationSettings, vocabulary: int | None) -> str | None:
    alternatives = scored.top_logprobs
    if len(alternatives) > settings.top_logprobs:
        return f"it answered {len(alternatives)} alternatives to a token in place of {settings.top_logprobs}"
    if not all(map(math.isfinite, (scored.logprob, *(other for _, other in alternatives)))):
        return "it answered a token that it gives no probability"
    outside = next((token for token, _ in alternatives if token >= (vocabulary or _MOST_TOKENS)), None)
    return None if outside is None else f"it answered the alternative {outside} of a vocabulary of {vocabulary}"


def suspects(peers: Sequence[str], said: Mapping[str, tuple[int, int]], position: int) -> list[str]:
    """Where on a route an answer stands still, by the tokens cached and pending that each server says it has, of `position` that the
    client knows: between two neighbours, the second of which has less than the first; between the head and the first server, where
    nobody has the last token; else at the head."""
    for before, after in pairwise(peers):
        if said[after][0] < said[before][0]:
            return [before, after]
    if len(peers) > 1 and said[peers[0]][0] < position:
        return [peers[-1], peers[0]]
    return [peers[-1]]
