"""Peers to keep away from for a while: each fault bans for longer than the one before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from corolla.errors import NetworkError, ServerFault


@dataclass(frozen=True, slots=True, kw_only=True)
class BanPolicy:
    """How long faults ban, in seconds: `shortest`, then twice the last ban, up to `longest`.

    A peer whose last ban ended `memory` seconds ago starts from `shortest` again. `peers` bans are remembered at most, those
    that last longest: new ids cost a hostile peer nothing.
    """

    shortest: float = 2.0
    longest: float = 300.0
    memory: float = 900.0
    peers: int = 4096


@dataclass(slots=True)
class _Ban:
    seconds: float
    until: float


def blameworthy(error: BaseException) -> bool:
    """Whether an error speaks against the peer that it came from: a server's fault or the network's, never the caller's."""
    return isinstance(error, (ServerFault, NetworkError))


class Bans:
    """Which peers are banned now. For any thread.

    `clock` returns seconds that never run backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, policy: BanPolicy | None = None) -> None:
        self._clock = clock
        self._policy = policy or BanPolicy()
        self._bans: dict[str, _Ban] = {}
        self._lock = Lock()

    def blame(self, peer: str) -> float:
        """Ban `peer` for its fault; returns the seconds until it may be tried again.

        Faults during a ban do not lengthen it: the sessions of a server that died all blame it for one death.
        """
        now = self._clock()
        with self._lock:
            self._bans = {name: ban for name, ban in self._bans.items() if now < ban.until + self._policy.memory}
            ban = self._bans.get(peer)
            if ban is None and len(self._bans) >= self._policy.peers:
                del self._bans[min(self._bans, key=lambda name: self._bans[name].until)]
            if ban is None or now >= ban.until:
                seconds = self._policy.shortest if ban is None else min(2 * ban.seconds, self._policy.longest)
                ban = self._bans[peer] = _Ban(seconds, now + seconds)
            return ban.until - now

    def forgive(self, peer: str) -> None:
        """`peer` has done its work: its next ban is the shortest again. A ban under way goes on, for the good news may be late."""
        with self._lock:
            ban = self._bans.get(peer)
            if ban is not None and self._clock() >= ban.until:
                del self._bans[peer]

    def seconds_left(self, peer: str) -> float:
        """Seconds until `peer` is not banned any more; 0 if it is not."""
        ban = self._bans.get(peer)
        return 0.0 if ban is None else max(0.0, ban.until - self._clock())

    def banned(self) -> frozenset[str]:
        """The peers that are banned now."""
        now = self._clock()
        with self._lock:
            return frozenset(name for name, ban in self._bans.items() if now < ban.until)
