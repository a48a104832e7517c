"""Which servers this node has seen at work: it asks each for a ping, and for a forward of one row over all blocks that it claims.

A record is only a claim. Placement and routing believe in the servers that answered such a probe lately, and cap what those
claim by what was seen. Bookkeeping alone: what is sent goes through `send`, and answers are handed to `receive`.
"""

from __future__ import annotations

import math
import random
import secrets
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Literal

import msgspec

from corolla.messages import Array, FailedFrame, ForwardFrame, Ping, Pong, ResultFrame, WireMessage
from corolla.swarm.records import ServerRecord

Verdict = Literal["unproven", "alive", "proven", "failing", "silent"]
"""unproven: not asked yet, or not answered yet. alive: it answers pings and has computed nothing (it loads, or is busy). proven: it
computed lately. failing: it refused to compute, computed what cannot be, or says that its engine is dead. silent: no answer came.
"""

_OVERHEAD = 0.005  # seconds of a probe that are no computation and no way
_REMEMBERED = 3  # probes, of which the quickest counts
_MOST_ROWS = 1e9  # rows/s through one block that anybody is believed
_MOST_TOKENS = 2**26  # free positions that anybody is believed


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """How many are asked, and how often; times in seconds."""

    newcomers: int = 16  # asked at most by one call of `ask`, of servers that are not proven
    renewals: int = 4  # asked at most by one call of `ask`, of those that are
    again: float = 60.0  # after an answer, until the same server is asked again
    patience: float = 10.0  # for an answer
    busy: float = 300.0  # for which a server that answers "busy" counts as proven, after it last computed
    loading: float = 600.0  # for which a server that says "joining" is believed to come
    retry: float = 10.0  # until a server that proved nothing is asked again; doubled each time
    retry_at_most: float = 320.0
    slack: float = 8.0  # times the throughput that was seen may be claimed: a probe also waits for others' steps
    forgotten: float = 120.0  # after a server was listed last


_Claim = tuple[int, int, int, str, bool]


@dataclass(slots=True, eq=False)
class _Seen:
    """What is known of one server. Times are of the clock; minus infinity is never."""

    claim: _Claim
    since: float  # it is listed with this claim
    listed: float
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))  # seconds of one block, by probe
    number: int = -1  # of the last question
    due: float = -math.inf
    asked: float = -math.inf
    ponged: float = -math.inf
    computed: float = -math.inf
    waits: bool = False  # the last question is not answered
    proven: bool = False  # by the last answer
    refused: bool = False  # by the last answer
    misses: int = 0  # questions in a row that proved nothing


class Probes:
    """For any thread. `send(peer, message)` may raise `NetworkError`; `clock` counts seconds, `chance` picks among newcomers."""

    def __init__(
        self,
        send: Callable[[str, WireMessage], None],
        config: ProbeConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._send, self._clock = send, clock
        self.config = config or ProbeConfig()
        self._chance = chance or random.Random()
        self._numbers = count(2**61 + secrets.randbelow(2**61))  # of calls and pings: nobody else's, and not to be guessed
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """How many questions may still be answered."""
        with self._lock:
            return sum(seen.waits and not self._overdue(seen) for seen in self._seen.values())

    def ask(self, records: Collection[ServerRecord], urgent: Collection[str] = ()) -> None:
        """Send a probe to those servers that are due, at most as many as the configuration says, and to the `urgent` ones of them in
        any case. `records` are all that are listed now. Raises `NetworkError` when this network is closed.
        """
        questions = []
        with self._lock:
            now = self._clock()
            for record in self._due(records, urgent, now):
                seen = self._seen[record.peer]
                if seen.waits and self._overdue(seen):
                    seen.misses += 1
                    seen.proven = False
                seen.number, seen.asked, seen.waits = next(self._numbers), now, True
                seen.due = now + max(self.config.patience, self._backoff(seen))
                questions.append((record, seen.number))
        for record, number in questions:
            self._send(record.peer, Ping(number))
            if record.state != "joining":
                self._send(record.peer, _question(record, number))

    def _due(self, records: Collection[ServerRecord], urgent: Collection[str], now: float) -> list[ServerRecord]:
        """Whom to ask now."""
        renewals: list[ServerRecord] = []
        newcomers: list[ServerRecord] = []
        at_once: list[ServerRecord] = []
        for record in records:
            seen = self._seen.get(record.peer)
            if seen is not None:
                seen.listed = now
            if seen is None or seen.claim != _claim(record):
                newcomers.append(record)
            elif record.peer in urgent and not (seen.waits and not self._overdue(seen)):
                at_once.append(record)
            elif seen.due <= now:
                (renewals if seen.proven else newcomers).append(record)
        self._seen = {peer: seen for peer, seen in self._seen.items() if now - seen.listed < self.config.forgotten}
        renewals.sort(key=lambda record: self._seen[record.peer].due)
        if len(newcomers) > self.config.newcomers:
            newcomers = self._chance.sample(newcomers, self.config.newcomers)
        chosen = [*at_once, *renewals[: self.config.renewals], *newcomers]
        for record in chosen:
            seen = self._seen.get(record.peer)
            if seen is None or seen.claim != _claim(record):
                paces = _Seen(_claim(record), now, now).paces if seen is None else seen.paces  # of the same machine
                self._seen[record.peer] = _Seen(_claim(record), now, now, paces)
        return chosen

    def receive(self, peer: str, message: WireMessage) -> None:
        """Take a message of a peer; whatever answers no probe is ignored."""
        if not isinstance(message, (Pong, ResultFrame, FailedFrame)):
            return
        with self._lock:
            seen = self._seen.get(peer)
            if seen is None:
                return
            now = self._clock()
            if isinstance(message, Pong):
                if message.failing:
                    self._settle(seen, now, proven=False, refused=True)
                elif message.nonce == seen.number:
                    seen.ponged = now
                    if _joins(seen.claim):
                        self._settle(seen, now, proven=False)
            elif isinstance(message, ResultFrame):
                if message.call == seen.number and seen.waits:
                    good = _computed(message.hidden, seen.claim)
                    if good:
                        seen.computed = now
                        seen.paces.append(self._pace(seen, now))
                    self._settle(seen, now, proven=good, refused=not good)
            elif message.session == str(seen.number) and seen.waits:
                busy = message.kind == "Busy"
                still = busy and now - seen.computed < self.config.busy
                self._settle(seen, now, proven=still, refused=not busy)

    def forget(self, peer: str) -> None:
        """The connection to a peer broke: what it proved before counts no more."""
        with self._lock:
            seen = self._seen.get(peer)
            if seen is not None:
                seen.proven, seen.due, seen.ponged = False, -math.inf, -math.inf

    def verdict(self, record: ServerRecord) -> Verdict:
        """What this node has seen of a server, as for what it claims now."""
        with self._lock:
            return self._verdict(record)

    def proven(self, records: Iterable[ServerRecord]) -> list[ServerRecord]:
        """The servers among them that computed lately, each capped by what was seen."""
        with self._lock:
            return [self._capped(record, _MOST_ROWS) for record in records if self._verdict(record) == "proven"]

    def believed(self, records: Iterable[ServerRecord]) -> list[ServerRecord]:
        """The servers among them to place blocks by: proven ones, and those that answer while they load, for a while; a server that has
        computed nothing yet is believed no more throughput than the quickest that has."""
        records = list(records)
        proven = self.proven(records)
        most = max((record.throughput for record in proven), default=_MOST_ROWS)
        with self._lock:
            now = self._clock()
            coming = [
                self._capped(record, most)
                for record in records
                if record.state == "joining"
                and self._verdict(record) == "alive"
                and now - self._seen[record.peer].since < self.config.loading
            ]
        return proven + coming

    def _verdict(self, record: ServerRecord) -> Verdict:
        seen = self._seen.get(record.peer)
        if seen is None or seen.claim != _claim(record):
            return "unproven"
        if seen.refused:
            return "failing"
        overdue = self._overdue(seen)
        if seen.proven and not overdue:
            return "proven"
        if seen.ponged >= seen.asked or (seen.ponged > -math.inf and not overdue):
            return "alive"
        return "silent" if overdue or seen.misses else "unproven"

    def _capped(self, record: ServerRecord, most: float) -> ServerRecord:
        seen = self._seen.get(record.peer)
        if seen is not None and seen.paces:
            most = self.config.slack / min(seen.paces)
        return msgspec.structs.replace(
            record, throughput=min(record.throughput, most, _MOST_ROWS), free_tokens=min(record.free_tokens, _MOST_TOKENS)
        )

    def _overdue(self, seen: _Seen) -> bool:
        return seen.waits and self._clock() - seen.asked >= self.config.patience

    def _settle(self, seen: _Seen, now: float, *, proven: bool, refused: bool = False) -> None:
        """The last question is answered."""
        seen.waits, seen.proven, seen.refused = False, proven, refused
        if proven:
            seen.misses = 0
            seen.due = now + self.config.again * self._chance.uniform(0.8, 1.2)
        else:
            seen.due = now + self._backoff(seen)
            seen.misses += 1

    def _backoff(self, seen: _Seen) -> float:
        return min(self.config.retry * 2 ** min(seen.misses, 10), self.config.retry_at_most)

    def _pace(self, seen: _Seen, now: float) -> float:
        """Seconds of a row in a block: those of the probe, without its way there and back."""
        took = now - seen.asked
        way = seen.ponged - seen.asked if seen.ponged >= seen.asked else 0.0
        start, end, *_ = seen.claim
        return max(took - way - _OVERHEAD, took / 10, 1e-9) / (end - start)


def _claim(record: ServerRecord) -> _Claim:
    return record.start, record.end, record.hidden, record.checkpoint, record.state == "joining"


def _joins(claim: _Claim) -> bool:
    return claim[-1]


@lru_cache(maxsize=4)
def _row(width: int) -> bytes:
    """What goes in: a row like those between blocks, of both signs and no two neighbours alike."""
    return array("f", [((i * 37) % 101 - 50) / 50 for i in range(width)]).tobytes()


def _question(record: ServerRecord, number: int) -> ForwardFrame:
    return ForwardFrame(number, record.start, record.end, (1,), Array("float32", (1, record.hidden), memoryview(_row(record.hidden))))


def _computed(answer: Array, claim: _Claim) -> bool:
    """Whether blocks may have made this of `_row`."""
    width = claim[2]
    if answer.dtype != "float32" or answer.shape != (1, width) or answer.data.nbytes != answer.nbytes:
        return False
    received = bytes(answer.data)
    return math.isfinite(sum(array("f", received))) and received != _row(width)
