"""Many requests answered at once, each by a session of its own; every result as soon as it is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corolla.barrier import barrier
from corolla.client.batch_requests import BatchRequest
from corolla.client.completion import Completion, CompletionResult
from corolla.client.session import Session
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import CallerError, CorollaError, InvalidSetting
from corolla.messages import Score
from corolla.swarm.transport import Transport
from corolla.types import GenerationSettings

if TYPE_CHECKING:
    from corolla.models.prompts import SoftPrompt

_MOST = 256  # sessions that an engine takes at once
_LOOK = 0.1  # seconds between two looks at how it is going
_PATIENCE = 5.0  # seconds for the answers under way to be let go of

Prepare = Callable[[BatchRequest], tuple[list[int], GenerationSettings]]
"""A request's tokens and settings; raises `CallerError` for one that cannot be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """`concurrency` sessions at once, `cache_tokens` of them all together (None: whatever the servers have), `timeout` seconds for
    one token at most. A request that fails by no fault of its own is asked `attempts` times."""

    concurrency: int = 32
    cache_tokens: int | None = None
    timeout: float = 600.0
    attempts: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= _MOST:
            raise InvalidSetting("concurrency", f"{self.concurrency} is not from 1 to {_MOST}")


@dataclass(slots=True)
class BatchCounts:
    """How far it is. Tokens are those of the answers, those of requests that are not finished yet among them."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Batch:
    """Answers requests through sessions at `peer` over `transport`, after a soft `prompt` if there is one.

    `write` gets (index, result), from one thread at a time. Greedy answers are those of a request asked alone, in float32 or where the
    engine is batch-invariant.
    """

    def __init__(
        self,
        transport: Transport,
        peer: str,
        tokenizer: TextTokenizer,
        prepare: Prepare,
        write: Callable[[int, dict[str, Any]], None],
        config: BatchConfig | None = None,
        prompt: SoftPrompt | None = None,
    ) -> None:
        self._transport, self._peer, self._tokenizer = transport, peer, tokenizer
        self._prepare, self._write, self._prompt = prepare, write, prompt
        self._config = config or BatchConfig()
        self._lock = threading.Lock()
        self._room = threading.Condition()
        self._taken = 0  # of `cache_tokens`
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self.counts = BatchCounts()

    def run(self, requests: Iterator[BatchRequest], report: Callable[[BatchCounts], None] | None = None) -> BatchCounts:
        """Answer all of `requests`; `report` is called ten times a second or so.

        Raises what `requests` and `write` raise. An interruption lets go of the answers under way; what was written stays.
        """
        workers = [
            threading.Thread(target=self._work, args=(requests,), name=f"corolla-batch-{number}", daemon=True)
            for number in range(self._config.concurrency)
        ]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(_LOOK)
                    if report is not None:
                        report(self.counts)
        finally:
            self._stopping.set()
            with self._room:
                self._room.notify_all()
            deadline = time.monotonic() + _PATIENCE
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        if self._error is not None:
            raise self._error
        return self.counts

    def _work(self, requests: Iterator[BatchRequest]) -> None:
        try:
            while not self._stopping.is_set():
                with self._lock:
                    request = next(requests, None)
                if request is None:
                    return
                result = self._settled(request)
                if result is None:
                    return
                with self._lock:
                    self._write(request.index, result)
                    self.counts.requests += 1
                    self.counts.errors += "error" in result
                    self.counts.prompt_tokens += result.get("prompt_tokens", 0)
        except BaseException as error:  # noqa: BLE001 (raised again by `run`, on its own thread)
            self._error = self._error or error
            self._stopping.set()

    def _settled(self, request: BatchRequest) -> dict[str, Any] | None:
        """`_answer`; what nobody expected is the failure of this request alone."""
        failed: list[Exception] = []
        with barrier("a batch's request", failed.append):
            return self._answer(request)
        return {"id": request.id, "error": {"type": type(failed[0]).__name__, "message": str(failed[0])}, "retry": True}

    def _answer(self, request: BatchRequest) -> dict[str, Any] | None:
        """The result; None where the run is stopped meanwhile."""
        described: dict[str, Any] = {"id": request.id}
        if request.metadata is not None:
            described["metadata"] = request.metadata
        try:
            if request.error is not None:
                raise request.error
            tokens, settings = self._prepare(request)
            with self._having_room(len(tokens) + settings.max_tokens_to_generate):
                answered = self._ask(tokens, settings)
        except CallerError as error:
            return described | _failure(error)
        except CorollaError as error:
            return described | _failure(error) | {"retry": True}
        if answered is None:
            return None
        result, scores = answered
        described |= {
            "text": result.text,
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": len(result.token_ids),
        }
        if request.logprobs:
            described["logprobs"] = self._logprobs(result.token_ids, result.logprobs, result.top_logprobs)
        if scores:
            given = [scores[position] for position in sorted(scores)]
            ids = [tokens[position] for position in sorted(scores)]
            described["prompt_logprobs"] = self._logprobs(ids, [s.logprob for s in given], [s.top_logprobs for s in given])
        return described

    def _ask(self, tokens: Sequence[int], settings: GenerationSettings) -> tuple[CompletionResult, dict[int, Score]] | None:
        attempt = 0
        while not self._stopping.is_set():
            attempt += 1
            counted = 0
            try:
                with Session(self._transport, self._peer, self._prompt) as session:
                    completion = Completion(session, self._tokenizer, tokens, settings, timeout=self._config.timeout)
                    for piece in completion:
                        if piece.token is not None:
                            counted += 1
                            self.counts.completion_tokens += 1
                        if self._stopping.is_set():
                            completion.close()
                            return None
                    assert completion.result is not None
                    return completion.result, {at - len(session.prefix): score for at, score in session.scores.items()}
            except CallerError:
                raise
            except CorollaError:
                self.counts.completion_tokens -= counted
                if attempt == self._config.attempts:
                    raise
        return None

    @contextmanager
    def _having_room(self, tokens: int) -> Iterator[None]:
        """Sessions that do not fit the cache together would evict one another, so they wait for one another instead."""
        most = self._config.cache_tokens
        if most is None:
            yield
            return
        tokens = min(tokens, most)
        with self._room:
            self._room.wait_for(lambda: self._taken + tokens <= most or self._stopping.is_set())
            self._taken += tokens
        try:
            yield
        finally:
            with self._room:
                self._taken -= tokens
                self._room.notify_all()

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[tuple[tuple[int, float], ...]]
    ) -> list[dict[str, Any]]:
        entries = []
        for token_id, logprob, others in zip(ids, logprobs, top, strict=True):
            entry: dict[str, Any] = {"token": self._text(token_id), "token_id": token_id, "logprob": logprob}
            if others:
                entry["top_logprobs"] = [{"token": self._text(other), "token_id": other, "logprob": value} for other, value in others]
            entries.append(entry)
        return entries

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


def _failure(error: CorollaError) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error)}}
