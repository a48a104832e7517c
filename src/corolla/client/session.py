"""A session as its client sees it: the whole token history, and answers that continue it."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from corolla.client.deadline import LOOK, Deadline
from corolla.errors import (
    AdapterError,
    CallerError,
    CapacityError,
    DeadlineExceeded,
    EmptyPrompt,
    Forgotten,
    NetworkError,
    PromptNeeded,
    ServerFault,
)
from corolla.messages import Cancel, Close, Gap, Reply, Score, Scores, Token
from corolla.swarm.transport import Transport
from corolla.types import AdapterPart, Failed, GenerationSettings, Give, PromptName, PromptPart, Span, Step

if TYPE_CHECKING:
    from corolla.models.adapters import Adapter
    from corolla.models.prompts import SoftPrompt

_PLACEHOLDER = 0  # a token for each position that a soft prompt takes; which one is of no matter
_LEAST_SLEEP = 0.1  # seconds until a full server is asked again, whatever it says
_JITTER = 1.5  # times as long at most
_MOST_GIVEN = 8  # a route may change several times before a token comes


class Session:
    """One conversation's token history and the link to the server that caches it.

    `tokens` holds every token in order: prompts and answers, sampled end tokens included. The server's cache is only a
    copy of its beginning, so a server that forgot (evicted, restarted, replaced) is sent what it lacks.
    With a soft `prompt` the history begins with a placeholder for each of its tokens: `prefix`. An `adapter` is given to servers that
    ask for it; one that is named by its digest has to be there.
    Not for several threads at once. Raises `NetworkError` when `peer` cannot be reached.
    """

    def __init__(self, transport: Transport, peer: str, prompt: SoftPrompt | None = None, adapter: Adapter | str | None = None) -> None:
        self.name = uuid.uuid4().hex
        self.prompt = prompt
        self._brings = None if isinstance(adapter, str) else adapter
        self.adapter = adapter if isinstance(adapter, str) else "" if adapter is None else adapter.digest  # its digest
        self.prefix = [] if prompt is None else [_PLACEHOLDER] * len(prompt)
        self.tokens = list(self.prefix)
        self.scores: dict[int, Score] = {}  # of the tokens that the last answer continued, by position, where they were asked for
        self._cached = 0  # how many tokens the server is known to have
        self._generation = 0
        self._given = 0  # times that servers were sent the soft prompt or the adapter, since the last token
        self._asked = 0  # when the answer under way was, in unix milliseconds
        self._replies: SimpleQueue[Reply] = SimpleQueue()
        self._link = transport.connect(peer, self._replies.put)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def position(self) -> int:
        """How many tokens the history has."""
        return len(self.tokens)

    def common_prefix(self, tokens: Sequence[int]) -> int:
        """How many tokens `tokens` and the history share from the beginning."""
        for index, (ours, theirs) in enumerate(zip(self.tokens, tokens, strict=False)):
            if ours != theirs:
                return index
        return min(len(self.tokens), len(tokens))

    def rollback(self, position: int) -> None:
        """Forget every token from `position` on; the next step tells the server. Raises `ValueError` outside the history."""
        if not len(self.prefix) <= position <= len(self.tokens):
            raise ValueError(f"position {position} lies outside a history of {len(self.prefix)} to {len(self.tokens)} tokens")
        del self.tokens[position:]
        self._cached = min(self._cached, position)

    def generate(self, token_ids: Sequence[int], settings: GenerationSettings, *, timeout: float = 60.0) -> Generator[Token, None, None]:
        """Append `token_ids` to the history and yield the answer's tokens, each as it joins the history.

        The last one carries `finish`. Closing the iterator early cancels the answer; what was yielded stays in the history.
        `timeout` is the longest wait for one token, in seconds; a busy server is asked again until then.
        Without `token_ids` the answer continues the history as it stands. With `prompt_logprobs` the whole history is computed
        anew, and `scores` holds those of its tokens when the first token of the answer comes.

        Raises `EmptyPrompt` when there is nothing to go on from, `DeadlineExceeded`, and whatever error the server answers
        with. After a `CallerError` before the first token the history is as it was.
        """
        before = self.position
        self._asked = int(time.time() * 1000)
        self.tokens.extend(token_ids)
        if not self.tokens:
            raise EmptyPrompt
        expected = self.position
        finished = False
        self.scores = {}
        if settings.prompt_logprobs:
            self._cached = 0
        try:
            deadline = Deadline(timeout)
            self._step(settings, deadline)
            while not finished:
                reply = self._wait(deadline)
                if isinstance(reply, Token):
                    if reply.position != self.position:
                        continue  # a repetition
                    self.tokens.append(reply.token_id)
                    self._given = 0
                    self._cached = reply.position
                    finished = reply.finish is not None
                    yield reply
                    deadline.restart()
                elif isinstance(reply, Scores):
                    new = {at: score for at, score in enumerate(reply.scores, reply.start) if at < expected and at not in self.scores}
                    self.scores |= new
                    if new:
                        deadline.restart()
                elif isinstance(reply, Gap):
                    self._close_gap(reply.have)
                    self._step(self._remaining(settings, expected), deadline)
                elif isinstance(reply, Failed):
                    if isinstance(reply.error, Forgotten):
                        self._give(reply.error)
                        self._step(self._remaining(settings, expected), deadline)
                        continue
                    if not isinstance(reply.error, CapacityError):
                        finished = True  # nothing runs that could be cancelled
                        raise reply.error
                    self._sleep(reply.error, deadline)
                    self._step(self._remaining(settings, expected), deadline)
        except CallerError:
            finished = True
            if self.position == expected:
                self.rollback(before)
            raise
        finally:
            if not finished:
                self._cancel()

    def close(self) -> None:
        """Tell the server that the session is over and leave. Closing twice is no error."""
        with suppress(NetworkError):  # a server that is gone holds nothing of ours
            self._link.send(Close(self.name))
        self._link.close()

    def _step(self, settings: GenerationSettings, deadline: Deadline) -> None:
        """Send what the server lacks: at least one token, for it has to compute the logits after the last one."""
        while True:
            self._generation += 1
            start = min(self._cached, self.position - 1)
            try:
                self._link.send(
                    Step(
                        self.name,
                        start,
                        tuple(self.tokens[start:]),
                        self._generation,
                        settings,
                        self.adapter,
                        asked=self._asked,
                        prompt=self._prompt_name,
                        brings_adapter=self._brings is not None,
                    )
                )
            except CapacityError as full:
                self._sleep(full, deadline)
            except Forgotten as lacking:
                self._give(lacking)
            else:
                return

    @property
    def _prompt_name(self) -> PromptName | None:
        prompt = self.prompt
        return None if prompt is None else PromptName(prompt.digest, len(prompt), deep=prompt.deep is not None)

    def _give(self, lacking: Forgotten) -> None:
        """Send the soft prompt or the adapter to servers that do not have it, again and again as they forget it or are replaced. Raises
        `lacking` when they ask for it too often, and `AdapterError` for an adapter that this session only knows the name of."""
        part = self._prompt_part() if isinstance(lacking, PromptNeeded) else self._adapter_part()
        if part is None and self.adapter:
            raise AdapterError(f"a server does not have the adapter {self.adapter[:12]}: name its directory, so that it can be sent")
        self._given += 1
        if part is None or self._given > _MOST_GIVEN:
            raise lacking
        self._link.send(Give(self.name, part))

    def _prompt_part(self) -> PromptPart | None:
        prompt, name = self.prompt, self._prompt_name
        if prompt is None or name is None:
            return None
        return PromptPart(name, Span(0, 1 if prompt.deep is None else len(prompt.deep)), prompt.input, prompt.deep)

    def _adapter_part(self) -> AdapterPart | None:
        return None if self._brings is None else self._brings.part(Span(0, len(self._brings.blocks)))

    def _close_gap(self, have: int) -> None:
        start = min(self._cached, self.position - 1)
        if not 0 <= have <= start:
            raise ServerFault(f"the server says it lacks tokens before {start} and yet has {have}")
        self._cached = have

    def _wait(self, deadline: Deadline) -> Reply:
        """The next reply to the step under way; late ones to earlier steps are ignored. What has arrived is taken before the deadline
        is looked at."""
        while True:
            left = deadline.look()
            try:
                reply = self._replies.get(timeout=min(max(0.0, left), LOOK))
            except Empty:
                if left <= 0:
                    raise DeadlineExceeded("the server did not answer in time: try again, or allow a longer timeout") from None
                continue
            if reply.session == self.name and reply.generation == self._generation:
                return reply

    def _remaining(self, settings: GenerationSettings, began: int) -> GenerationSettings:
        """What is left of an answer that began at a position and is asked for again."""
        return replace(settings, max_tokens_to_generate=settings.max_tokens_to_generate - (self.position - began))

    def _sleep(self, full: CapacityError, deadline: Deadline) -> None:
        """Until there may be room; never so short that a server is asked again and again, nor just as long as all others wait.
        Raises `full` where the deadline comes before that."""
        seconds = max(full.retry_after, _LEAST_SLEEP) * random.uniform(1.0, _JITTER)
        if seconds > deadline.look():
            raise full
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LOOK))
            deadline.look()

    def _cancel(self) -> None:
        with suppress(NetworkError):  # the answer died with its server
            self._link.send(Cancel(self.name, self._generation))
