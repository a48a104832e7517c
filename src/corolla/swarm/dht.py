"""hivemind's node, in a process that does not outlive the one that started it.

A server whose process alone is killed, as happens where memory runs out, would else leave its node and libp2p daemon behind:
they would keep its port, its key and every connection of a server that is dead.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

import psutil
from hivemind import DHT

_LOOK_EVERY = 0.5  # seconds
_TO_END = 5.0  # seconds that it gets


class Node(DHT):
    """A `hivemind.DHT` that ends, with its daemon, when its parent is gone."""

    def run(self) -> None:
        """See `hivemind.DHT.run`; this is the child process."""
        threading.Thread(target=_end_with, args=(os.getppid(),), name="corolla-parent", daemon=True).start()
        super().run()

    def end(self) -> None:
        """Shut it down; by force, with its daemon, where it does not end by itself, as a process that was forked into a held lock."""
        self.shutdown()
        self.join(_TO_END)
        if self.is_alive():
            with suppress(psutil.NoSuchProcess):  # it ends just now
                for child in psutil.Process(self.pid).children(recursive=True):
                    child.kill()
            self.kill()
            self.join()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)
