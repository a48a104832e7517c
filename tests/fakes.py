"""A server without a model, for the tests of everything that talks to one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue

from corolla.errors import CorollaError
from corolla.messages import Cancel, Close, Gap, Message, Token
from corolla.swarm.local import LocalTransport
from corolla.swarm.transport import Deliver
from corolla.types import Failed, FinishReason, Step

Script = Callable[[list[int]], Iterable[int]]
"""From a session's history to the tokens of the answer; an endless one runs until it is cancelled or the limit is reached."""


class FakeEngine:
    """Answers steps by a script, on a thread of its own, with the engine's rules about positions, ends and cancellation.

    `received` are the messages in order. `refuse` are errors that the next messages meet at once, `fail` are errors that
    the next steps end in. `forget` loses every cache; `silent` swallows steps.
    """

    def __init__(self, script: Script) -> None:
        self.received: list[Message] = []
        self.refuse: list[CorollaError] = []
        self.fail: list[CorollaError] = []
        self.silent = False
        self.transport = LocalTransport()
        self.transport.listen("fake", self.receive)
        self._script = script
        self._caches: dict[str, list[int]] = {}
        self._cancelled: set[tuple[str, int]] = set()
        self._work: SimpleQueue[tuple[Step, Deliver] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def steps(self) -> list[Step]:
        return [message for message in self.received if isinstance(message, Step)]

    def receive(self, message: Message, deliver: Deliver) -> None:
        self.received.append(message)
        if isinstance(message, Step):
            if self.refuse:
                raise self.refuse.pop(0)
            if not self.silent:
                self._work.put((message, deliver))
        elif isinstance(message, Cancel):
            self._cancelled.add((message.session, message.generation))
        elif isinstance(message, Close):
            self._caches.pop(message.session, None)

    def forget(self, keep: int = 0) -> None:
        for cache in self._caches.values():
            del cache[keep:]

    def stop(self) -> None:
        self._work.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._step(*work)

    def _step(self, step: Step, deliver: Deliver) -> None:
        cache = self._caches.setdefault(step.session, [])
        assert step.settings is not None
        assert isinstance(step.payload, Sequence)
        if self.fail:
            deliver(Failed(step.session, step.generation, self.fail.pop(0)))
            return
        if len(cache) < step.start:
            deliver(Gap(step.session, step.generation, len(cache)))
            return
        cache[step.start :] = step.payload
        for count, token_id in enumerate(self._script(list(cache)), start=1):
            if (step.session, step.generation) in self._cancelled:
                return
            finish = None
            if token_id in step.settings.stop_token_ids:
                finish = FinishReason.STOP
            elif count == step.settings.max_tokens_to_generate:
                finish = FinishReason.LENGTH
            position = len(cache)
            deliver(Token(step.session, step.generation, position, token_id, -float(count), finish=finish))
            if finish:
                return
            cache.append(token_id)
