"""A transport whose session can be interrupted from another thread, and that tells when an answer is sent again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from corolla.errors import Interrupted, NetworkError
from corolla.messages import Cancel, Gap, Message, Reply, Token
from corolla.swarm.transport import Deliver, Link, Transport
from corolla.types import Failed, Step


class InterruptibleTransport:
    """A `Transport` of one session, and its link at the same time.

    A session waits for replies on a thread of its own. `interrupt` ends that wait from any thread: the session gets `Failed`
    with `Interrupted`, the servers get `Cancel`. `on_restart` is called (on a thread of the network) when an answer that had begun
    has to be sent again, because a server of the route is gone or has moved.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._link: Link
        self._deliver: Deliver
        self._step: Step | None = None  # under way
        self._begun = False  # the answer under way has a token
        self._interrupted = False
        self.on_restart: Callable[[], None] | None = None

    def connect(self, peer: str, deliver: Deliver) -> InterruptibleTransport:
        """See `Transport.connect`."""
        self._deliver = deliver
        self._link = self._transport.connect(peer, self._reply)
        return self

    def begin(self) -> None:
        """An answer begins: the interruption of an earlier one is over."""
        with self._lock:
            self._interrupted = self._begun = False
            self._step = None

    def send(self, message: Message) -> None:
        """See `Link.send`; also raises `Interrupted`."""
        if not isinstance(message, Step):
            self._link.send(message)
            return
        with self._lock:
            if self._interrupted:
                raise Interrupted
            self._step = message
            self._link.send(message)

    def interrupt(self) -> None:
        """End the answer under way, or that is about to begin."""
        with self._lock:
            self._interrupted = True
            step = self._step
            if step is None:
                return
            self._deliver(Failed(step.session, step.generation, Interrupted()))
            with suppress(NetworkError):  # what cannot be reached computes nothing for us
                self._link.send(Cancel(step.session, step.generation))

    def close(self) -> None:
        """See `Link.close`."""
        self._link.close()

    def _reply(self, reply: Reply) -> None:
        if isinstance(reply, Token):
            self._begun = True
        elif isinstance(reply, Gap) and self._begun and self.on_restart is not None:
            self.on_restart()
        self._deliver(reply)
