"""One answer as text: a session's tokens decoded, cut at stop sequences, and timed."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from corolla.client.session import Session
from corolla.client.text import Detokenizer, StopMatcher
from corolla.client.tokenizer import TextTokenizer
from corolla.messages import Token
from corolla.types import FinishReason, GenerationSettings


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """What one token added: `text` may be empty while something is held back, `token` is `None` for what came out at the end."""

    text: str
    token: Token | None


@dataclass(frozen=True, slots=True)
class Timings:
    """In seconds from the request; `first_token_s` is `None` when no token came."""

    total_s: float
    first_token_s: float | None
    tokens_per_s: float | None  # after the first token; `None` for fewer than two


@dataclass(frozen=True, slots=True)
class CompletionResult:
    """A finished answer; the lists are parallel and hold the end token too, which has no text.

    `finish_reason` is `None` when the answer was interrupted. `cached_tokens` of the prompt did not have to be sent.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    timings: Timings


class Completion:
    """The answer to `prompt` (the whole of it: what the session has of it already is neither sent nor computed again).

    Iterate for its pieces; `result` stands when the iteration has ended, by `close` or an exception too. After a stop
    sequence, or an interruption, the session's history ends with the last token whose text was given out whole.
    Iterating raises what `Session.generate` raises.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        settings: GenerationSettings,
        *,
        timeout: float = 60.0,
    ) -> None:
        self._session = session
        self._prompt = prompt
        self._settings = settings
        self._timeout = timeout
        self._detokenizer = Detokenizer(tokenizer.decode, prompt)
        self._matcher = StopMatcher(settings.stop_sequences)
        self._tokens: list[Token] = []
        self._ends: list[tuple[int, int]] = [(0, 0)]  # (tokens, characters) wherever all text of so many tokens was out
        self._characters = 0
        self._texts: list[str] = []
        self._finish: FinishReason | None = None
        self._cached = 0
        self._began = 0  # the position of the answer's first token
        self._arrivals: list[float] = []
        self._pieces = self._run()
        self.result: CompletionResult | None = None

    def __iter__(self) -> Generator[CompletionDelta, None, None]:
        return self._pieces

    def close(self) -> None:
        """Stop the answer where it is."""
        self._pieces.close()

    def run(self) -> CompletionResult:
        """The result, after iterating to the end."""
        for _ in self:
            pass
        assert self.result is not None
        return self.result

    def _run(self) -> Generator[CompletionDelta, None, None]:
        began = time.perf_counter()
        whole, soft = [*self._session.prefix, *self._prompt], len(self._session.prefix)
        shared = self._session.common_prefix(whole)
        self._cached, self._began = shared - soft, len(whole)
        self._session.rollback(shared)
        tokens = self._session.generate(self._prompt[self._cached :], self._settings, timeout=self._timeout)
        try:
            with closing(tokens):
                for token in tokens:
                    self._arrivals.append(time.perf_counter())
                    yield CompletionDelta(self._accept(token), token)
                    if self._matcher.stopped:
                        break
            rest = self._out(self._matcher.push(self._detokenizer.flush()) + self._matcher.flush())
            if rest:
                yield CompletionDelta(rest, None)
        finally:
            self._cut()
            self.result = self._conclude(began)

    def _accept(self, token: Token) -> str:
        self._tokens.append(token)
        self._finish = token.finish
        if token.finish is FinishReason.STOP:
            return ""
        text = self._detokenizer.push(token.token_id)
        self._characters += len(text)
        if self._detokenizer.settled:
            self._ends.append((len(self._tokens), self._characters))
        return self._out(self._matcher.push(text))

    def _out(self, text: str) -> str:
        self._texts.append(text)
        return text

    def _cut(self) -> None:
        """Drop the tokens that reach beyond the text, unless the answer came to an end of its own."""
        if self._matcher.stopped:
            self._finish = FinishReason.STOP
        elif self._finish is not None:
            return
        length = sum(map(len, self._texts))
        kept = max(tokens for tokens, characters in self._ends if characters <= length)
        del self._tokens[kept:]
        if self._session.position > self._began + kept:
            self._session.rollback(self._began + kept)

    def _conclude(self, began: float) -> CompletionResult:
        ended = time.perf_counter()
        first = self._arrivals[0] - began if self._arrivals else None
        between = self._arrivals[-1] - self._arrivals[0] if len(self._arrivals) > 1 else 0.0
        return CompletionResult(
            text="".join(self._texts),
            token_ids=[token.token_id for token in self._tokens],
            logprobs=[token.logprob for token in self._tokens],
            top_logprobs=[token.top_logprobs for token in self._tokens],
            finish_reason=self._finish,
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached,
            timings=Timings(ended - began, first, (len(self._arrivals) - 1) / between if between else None),
        )
