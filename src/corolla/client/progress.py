"""Whether a step gets on: by the answers that come, and by what its servers say when none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from corolla.messages import Whereabouts


@dataclass(frozen=True, slots=True)
class Standstill:
    """Nobody got further between two rounds of questions.

    Args:
        working: the servers that say they have something to compute, or do not say.
        said: tokens cached and rows pending at each server.
    """

    working: tuple[str, ...]
    said: Mapping[str, tuple[int, int]]


@dataclass(slots=True)
class Progress:
    """Of one step. Times are those of one clock, in seconds. It counts as progress that the next answer comes and, while the prompt is
    computed, that more of it is cached at any server than ever before. That a server lives, or says that it computes, does not.
    """

    moved: float  # when there was progress, or the servers were last asked in vain
    alive: float  # when there was progress, or every server last said that it lives
    pinged: float | None = None  # since when the servers have been asked whether they live
    asked: float | None = None  # since when they have been asked how far they are
    _said: dict[str, tuple[int, int]] = field(default_factory=dict)
    _most: dict[str, int] | None = None  # cached in earlier rounds

    def restart(self, now: float) -> None:
        """The step got on, or nothing can be said about the time until now."""
        self.moved = self.alive = now
        self.pinged = self.asked = None
        self._said, self._most = {}, None

    def ask(self, now: float) -> None:
        """The servers are asked how far they are."""
        self.asked, self._said = now, {}

    def record(self, sender: str, answer: Whereabouts, known: int) -> int:
        """A server's answer; what it has beyond the `known` tokens is no progress. Returns how many have answered this round."""
        self._said[sender] = min(answer.cached, known), answer.pending
        return len(self._said)

    def conclude(self, peers: Sequence[str], now: float) -> Standstill | None:
        """The round is over: None where anybody got further."""
        said, most = self._said, self._most
        self._most = {peer: max(said.get(peer, (0, 0))[0], (most or {}).get(peer, 0)) for peer in peers}
        self.moved, self.asked = now, None
        if most is None or self._most != most:
            return None
        working = tuple(peer for peer in peers if peer not in said or said[peer][1])
        return Standstill(working, {peer: said.get(peer, (0, 0)) for peer in peers})
