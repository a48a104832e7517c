"""Bytes that clients make an engine hold: a budget for each kind, and a share of it for each client."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from corolla.errors import Busy


@dataclass(frozen=True, slots=True)
class Budgets:
    """How the bytes that an engine may hold for its clients, beside weights and KV cache, are divided among what it holds."""

    size: int  # bytes of everything

    @property
    def activations(self) -> int:
        """Of forwards that are kept for their backwards, and of weights widened for these."""
        return self.size // 2

    @property
    def calls(self) -> int:
        """Of calls that wait."""
        return self.size // 8

    @property
    def prompts(self) -> int:
        return self.size // 8

    @property
    def adapters(self) -> int:
        return self.size // 8

    @property
    def steps(self) -> int:
        """Of rows and token ids that wait to be computed, and of the histories of sessions."""
        return self.size // 8


class Ledger:
    """What each client holds of a budget. For any thread.

    Args:
        size: bytes of all clients.
        per_client: bytes of one; a client that holds nothing may take more at once.
        retry_after: seconds, told to who is turned away.
    """

    def __init__(self, size: int, per_client: int, retry_after: float) -> None:
        self._size, self._per_client, self._retry_after = size, per_client, retry_after
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._total = 0

    @property
    def total(self) -> int:
        """Bytes held by all clients."""
        return self._total

    def take(self, client: str, size: int) -> None:
        """Raises `Busy` where the client, or all together, would hold more than they may. One that holds nothing is only turned away
        where others hold something, and there is no room beside it."""
        with self._lock:
            held = self._held.get(client, 0)
            if (held and held + size > self._per_client) or (self._total and self._total + size > self._size):
                raise Busy(self._retry_after)
            self._held[client] = held + size
            self._total += size

    def give_back(self, client: str, size: int) -> None:
        with self._lock:
            self._total -= size
            self._held[client] -= size
            if not self._held[client]:
                del self._held[client]
