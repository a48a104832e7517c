"""Round trips to other peers, measured with pings and smoothed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from corolla.messages import Ping, Pong

_NEW = 0.3  # the share of a new measurement in the smoothed one
_FORGOTTEN_AFTER = 10.0  # seconds without an answer


class RoundTrips:
    """Asks peers through `send(peer, ping)`. For any thread; `clock` counts seconds."""

    def __init__(self, send: Callable[[str, Ping], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._send, self._clock = send, clock
        self._lock = threading.Lock()
        self._asked: dict[int, tuple[str, float]] = {}
        self._seconds: dict[str, float] = {}
        self._nonce = 0

    @property
    def seconds(self) -> Mapping[str, float]:
        """The round trip to each peer that has answered."""
        with self._lock:
            return dict(self._seconds)

    def of(self, peer: str) -> float:
        """The round trip to a peer in seconds; 0 where it is not known."""
        return self._seconds.get(peer, 0.0)

    def ask(self, peers: Iterable[str]) -> None:
        """Send a ping to each. Raises `NetworkError` when this network is closed."""
        for peer in peers:
            with self._lock:
                now = self._clock()
                self._asked = {nonce: asked for nonce, asked in self._asked.items() if now - asked[1] < _FORGOTTEN_AFTER}
                self._nonce += 1
                nonce = self._nonce
                self._asked[nonce] = peer, now
            self._send(peer, Ping(nonce))

    def answered(self, peer: str, pong: Pong) -> None:
        """Take a peer's answer; one that was not asked for, or comes from another peer, is ignored."""
        with self._lock:
            asked, sent = self._asked.get(pong.nonce, ("", 0.0))
            if asked != peer:
                return
            del self._asked[pong.nonce]
            took = self._clock() - sent
            self._seconds[peer] = took if peer not in self._seconds else (1 - _NEW) * self._seconds[peer] + _NEW * took

    def forget(self, peer: str) -> None:
        """A peer is gone."""
        with self._lock:
            self._seconds.pop(peer, None)
