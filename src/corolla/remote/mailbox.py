"""What servers answer, waited for: one call's or one session's answers, and the signs that none will come."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Lock

from corolla.client.deadline import LOOK, Pauses
from corolla.client.progress import Progress
from corolla.client.reply_validation import believed
from corolla.errors import CallerError, CapacityError, DeadlineExceeded, Forgotten, NetworkError, ProtocolError
from corolla.messages import Ask, FailedFrame, HiddenFrame, ResultFrame, Whereabouts
from corolla.remote.incoming import Answer, Declined, Fault, Forgot, Incoming, Lost, StandsStill
from corolla.remote.servers import Servers
from corolla.swarm.convert import error_of

_MOST_BESIDE = 256  # messages without rows that wait to be read


@contextmanager
def open_mailbox(servers: Servers, key: str) -> Iterator[Mailbox]:
    """Where answers go whose call or session is `key`, until the block ends."""
    mailbox = Mailbox(servers)
    with servers.receiving(key, mailbox.put):
        yield mailbox


class Mailbox:
    """What servers answer to one call, or in one session. One thread waits at a time."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._lock = Lock()
        self._peers: frozenset[str] = frozenset()
        self._room = 0  # bytes of rows that may still come
        self._beside = 0  # messages without rows that wait
        self._inbox: SimpleQueue[tuple[str, Incoming]] = SimpleQueue()

    @property
    def waiting(self) -> int:
        """Messages that nobody has read yet."""
        return self._inbox.qsize()

    def open_to(self, peers: Collection[str], nbytes: int) -> None:
        """Take messages of these peers alone from now on, and `nbytes` more of rows: what is asked of them."""
        with self._lock:
            self._peers, self._room = frozenset(peers), self._room + nbytes

    def put(self, sender: str, message: Incoming) -> None:
        """For the network's thread. What nobody was asked for is dropped, and beyond the bounds it is a fault of its sender."""
        with self._lock:
            if sender not in self._peers:
                return
            nbytes = message.hidden.data.nbytes if isinstance(message, (ResultFrame, HiddenFrame)) else 0
            if nbytes > self._room or self._beside >= _MOST_BESIDE:
                self._peers -= {sender}
                message = Lost(ProtocolError("it sends more than it was asked for"))
            else:
                self._room -= nbytes
            self._beside += not isinstance(message, (ResultFrame, HiddenFrame))
        self._inbox.put((sender, message))

    def wait(self, peers: Sequence[str], generation: int = 0, session: str = "", end: int = 0) -> tuple[str, Answer]:
        """The next answer of one of `peers`, and whose it is; those of another generation are dropped.

        `end` is the position after the step's last row. The time in which this process stood still blames nobody.

        Raises `Fault` when one of them fails, is gone, does not live, does not answer in time, or gets no further while another one
        holds its blocks; `Declined` when one is full or refuses; `Forgot` when one lacks what it was sent once; `StandsStill` when the
        peers say twice that they have nothing left to compute for `session`.
        """
        config, servers, pauses = self._servers.config, self._servers, Pauses()
        since = time.monotonic()
        deadline, lost, asked = since + config.request_timeout, since + config.lost, math.inf
        progress = Progress(since, since)
        while True:
            until = min(since + config.silence if asked == math.inf else asked + config.answer, deadline)
            try:
                sender, message = self._inbox.get(timeout=min(LOOK, config.silence, max(0.0, until - time.monotonic())))
            except Empty:
                now = time.monotonic()
                if stood := pauses.look():
                    deadline, lost, since, asked = deadline + stood, lost + stood, now, math.inf
                    progress.restart(now)
                    continue
                if now >= deadline:
                    late = DeadlineExceeded(f"no answer came for {config.request_timeout:g} s")
                    raise Fault(min(peers, key=servers.peers.heard), late) from None
                if asked == math.inf:
                    if now >= until:
                        asked = now
                        servers.round_trips.ask(peers)
                    continue
                silent = [peer for peer in peers if servers.peers.heard(peer) < asked]
                if silent and now < until:
                    continue
                if silent:
                    silence = NetworkError(f"it did not answer for {config.silence + config.answer:g} s")
                    raise Fault(silent[0], silence) from None
                since, asked = now, math.inf
                if session and now >= lost:
                    lost = now + config.lost
                    if progress.asked is not None:
                        self._judge(progress, peers, now)
                    progress.ask(now)
                    for peer in peers:
                        servers.network.send(peer, Ask(session, generation))
                continue
            pauses.look()
            if not isinstance(message, (ResultFrame, HiddenFrame)):
                with self._lock:
                    self._beside -= 1
            if sender not in peers:
                continue
            if isinstance(message, Lost):
                raise Fault(sender, message.error)
            if not isinstance(message, ResultFrame) and message.generation != generation:
                continue
            if isinstance(message, Whereabouts):
                if progress.asked is not None and progress.record(sender, message, end) == len(peers):
                    self._judge(progress, peers, time.monotonic())
                continue
            if isinstance(message, FailedFrame):
                raise _failure(message, message.peer if message.peer in peers else sender)
            return sender, message

    def _judge(self, progress: Progress, peers: Sequence[str], now: float) -> None:
        """A round of questions is over."""
        stands = progress.conclude(peers, now)
        if stands is None:
            return
        if not stands.working:
            raise StandsStill
        if self._servers.goes_around(stands.working[0]):
            raise Fault(stands.working[0], DeadlineExceeded("it says that it computes, and gets no further"))


def _failure(message: FailedFrame, peer: str) -> Exception:
    """What a server's error means for who waits."""
    error = believed(error_of(message))
    if isinstance(error, Forgotten):
        return Forgot(peer, error)
    return Declined(peer, error) if isinstance(error, (CallerError, CapacityError)) else Fault(peer, error)
