"""What happened at an engine, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineCounters:
    """Since the engine was made."""

    steps: int = 0
    rows: int = 0  # tokens computed
    reused: int = 0  # tokens found in the cache of earlier sessions
    sampled: int = 0
    drafted: int = 0  # tokens that were guessed
    drafts_kept: int = 0  # of them, those that were sampled then
    gaps: int = 0
    unexpected: int = 0  # errors that nobody expected: each ended one session or one call, or counts towards the engine's end
    evicted_idle: int = 0
    evicted_running: int = 0
    call_pieces: int = 0  # of forward and backward calls
    call_pieces_put_off: int = 0  # because sessions had steps to compute
    # Of forwards of few rows, which take about as long as one row does: how many, and the seconds that one block of them took.
    light_steps: int = 0
    light_seconds: float = 0.0


def coarse(count: int) -> int:
    """A count of tokens as strangers are told it: its two leading bits. What one request adds to it is not to be seen: it would tell
    how much of the prompt was found, and so what others asked."""
    kept = max(0, count.bit_length() - 2)
    return count >> kept << kept
