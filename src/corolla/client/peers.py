"""What a client remembers of peers, for a while and within bounds: new ids cost a hostile peer nothing."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_MOST = 4096  # peers; a network is connected to 1,024 at once
_NEWS = 1.0  # seconds after which what was said may be said again
_DOUBTED_FOR = 60.0  # seconds for which both neighbours are gone around
_DOUBTED = 900.0  # seconds for which it is remembered with whom

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """A value by name, of the names that were written last. For any thread."""

    def __init__(self, most: int = _MOST) -> None:
        self._most, self._lock = most, threading.Lock()
        self._values: OrderedDict[str, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Value | None:
        return self._values.get(name)

    def items(self) -> list[tuple[str, Value]]:
        """All of them, the oldest first."""
        with self._lock:
            return list(self._values.items())

    def put(self, name: str, value: Value) -> None:
        with self._lock:
            self._values[name] = value
            self._values.move_to_end(name)
            if len(self._values) > self._most:
                self._values.popitem(last=False)

    def pop(self, name: str) -> None:
        with self._lock:
            self._values.pop(name, None)


@dataclass(slots=True)
class _Doubt:
    since: float
    beside: set[str] = field(default_factory=set)


class PeerBook:
    """Who was heard, who leaves, who is silent, full or doubted. For any thread; `clock` counts seconds.

    Args:
        leaving: seconds for which a peer that said it leaves, or fell silent, is avoided.
    """

    def __init__(self, leaving: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._leaving_for, self._clock = leaving, clock
        self._lock = threading.Lock()  # of the doubts
        self._heard: Recent[float] = Recent()
        self._leaving: Recent[float] = Recent()
        self._silent: Recent[float] = Recent()
        self._full: Recent[float] = Recent()  # until when
        self._doubts: Recent[_Doubt] = Recent()

    def hear(self, peer: str) -> None:
        """`peer` sent something."""
        self._heard.put(peer, self._clock())
        self._silent.pop(peer)

    def heard(self, peer: str) -> float:
        """When `peer` last sent anything; minus infinity if never."""
        when = self._heard.get(peer)
        return float("-inf") if when is None else when

    def leave(self, peer: str) -> bool:
        """`peer` said that it leaves. Returns whether that is news, and not said again and again."""
        said, now = self._leaving.get(peer), self._clock()
        if said is not None and now - said < _NEWS:
            return False
        self._leaving.put(peer, now)
        return True

    def fall_silent(self, peer: str) -> None:
        """Nothing came from `peer`: it is avoided until something does, or long enough for its record to expire."""
        self._silent.put(peer, self._clock())

    def fill(self, peer: str, seconds: float) -> None:
        """`peer` takes no more for so long."""
        self._full.put(peer, self._clock() + seconds)

    def doubt(self, neighbours: Sequence[str]) -> list[str]:
        """One of these may be at fault, and nobody can tell which: all are gone around for a while, wherever there is another way.

        Returns those that were doubted beside somebody else before, or alone and are again.
        """
        now, known = self._clock(), []
        with self._lock:
            for peer in neighbours:
                doubt = self._doubts.get(peer)
                others = set(neighbours) - {peer}
                if doubt is not None and now - doubt.since < _DOUBTED and (doubt.beside - others or not others):
                    known.append(peer)
                self._doubts.put(peer, _Doubt(now, others))
        return known

    @property
    def silent(self) -> frozenset[str]:
        """The peers that fell silent lately."""
        return self._since(self._silent)

    @property
    def leaving(self) -> frozenset[str]:
        """The peers that said lately that they leave."""
        return self._since(self._leaving)

    @property
    def avoided(self) -> frozenset[str]:
        """The peers that no session should go to now."""
        now = self._clock()
        full = frozenset(peer for peer, until in self._full.items() if until > now)
        return self._since(self._silent) | self._since(self._leaving) | full

    @property
    def doubted(self) -> tuple[str, ...]:
        """The peers that are better gone around, the oldest doubt first."""
        since = self._clock() - _DOUBTED_FOR
        return tuple(peer for peer, doubt in self._doubts.items() if doubt.since > since)

    def _since(self, named: Recent[float]) -> frozenset[str]:
        since = self._clock() - self._leaving_for
        return frozenset(peer for peer, when in named.items() if when > since)
