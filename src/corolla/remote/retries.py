"""What one call or one step of the PyTorch client bears before it gives up."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from corolla.errors import CapacityError
from corolla.remote.mailbox import Fault
from corolla.swarm.bans import Bans

if TYPE_CHECKING:
    from corolla.remote.servers import RemoteConfig

log = logging.getLogger(__name__)


class Retries:
    """What one call or step has borne so far."""

    def __init__(self, bans: Bans, config: RemoteConfig) -> None:
        self._bans, self._config = bans, config
        self._left = config.max_retries
        self._full_since: float | None = None

    def bear(self, error: Fault | CapacityError) -> None:
        """Ban the server that failed for a while, or wait until a full one has room, as long as it says.

        Raises the fault's error when there were too many, and that of the full server when it took too long.
        """
        if isinstance(error, Fault):
            seconds = self._bans.blame(error.peer)
            log.warning("server %s is left for %.0f s: %s", error.peer, seconds, error.error, extra={"peer": error.peer})
            self._left -= 1
            if self._left < 0:
                raise error.error from error
            return
        now, most = time.monotonic(), self._config.request_timeout
        self._full_since = self._full_since or now
        if now - self._full_since >= most:
            raise error
        time.sleep(min(error.retry_after, most))
