"""Where the time of an answer went, server by server."""

from __future__ import annotations

from collections.abc import Iterable

from corolla.messages import HopTiming


class Hops:
    """Sums the timings of steps; the servers stand in the order in which they were first met."""

    def __init__(self) -> None:
        self._of: dict[str, list[HopTiming]] = {}

    def add(self, timings: Iterable[HopTiming]) -> None:
        """One step's way."""
        for timing in timings:
            self._of.setdefault(timing.peer, []).append(timing)

    def means(self) -> list[dict[str, object]]:
        """For each server the means over its steps in milliseconds, and how many steps these were."""
        return [
            {
                "peer": peer,
                "steps": len(timings),
                "queue_ms": _mean_ms(timing.queue for timing in timings),
                "compute_ms": _mean_ms(timing.compute for timing in timings),
                "transfer_ms": _mean_ms(timing.transfer for timing in timings),
            }
            for peer, timings in self._of.items()
        ]


def _mean_ms(seconds: Iterable[float]) -> float:
    values = list(seconds)
    return round(1000 * sum(values) / len(values), 3)
