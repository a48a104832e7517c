"""What one call or one step of the PyTorch client bears before it gives up."""

from __future__ import annotations

import logging
import random
import time

from corolla.errors import CapacityError
from corolla.remote.incoming import Declined, Fault
from corolla.remote.servers import Servers

log = logging.getLogger(__name__)

_LEAST_FULL = 0.25  # seconds that a full server is gone around, whatever it says


class Retries:
    """What one call or step has borne so far."""

    def __init__(self, servers: Servers) -> None:
        self._servers, self._config = servers, servers.config
        self._left = self._config.max_retries
        self._full_since: float | None = None
        self._refused = False

    def on_failure(self, error: Fault | Declined) -> None:
        """Ban the server that failed for a while; go around a full one, or wait for it where nobody else holds its blocks; ask
        others once what one says is the caller's fault.

        Raises the server's error when there were too many faults, when all were full for too long, and when a second server, or
        the only one, says that the caller is at fault.
        """
        if isinstance(error, Fault):
            seconds = self._servers.bans.blame(error.peer)
            log.warning("server %s is left for %.0f s: %s", error.peer, seconds, error.error, extra={"peer": error.peer})
            self._left -= 1
            if self._left < 0:
                raise error.error from error
        elif isinstance(error.error, CapacityError):
            self._go_around(error.peer, error.error)
        else:
            if self._refused or not self._servers.goes_around(error.peer):
                raise error.error from error
            self._refused = True
            self._servers.peers.fill(error.peer, self._config.full)

    def _go_around(self, peer: str, full: CapacityError) -> None:
        now, most = time.monotonic(), self._config.request_timeout
        self._full_since = self._full_since or now
        if now - self._full_since >= most:
            raise full
        seconds = min(max(_LEAST_FULL, full.retry_after), self._config.full)
        self._servers.peers.fill(peer, seconds)
        if not self._servers.goes_around(peer):
            time.sleep(min(seconds, most) * random.uniform(1.0, 1.5))  # not all who wait come back at once
