"""The cores of a machine, shared among the servers on it."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

_PREFIX = "corolla-server-"
_SOCKETS = Path("/proc/net/unix")


class SharedCores:
    """How many threads a server computes with so that all servers on this machine together fill it, and no more.

    Teams of threads that wait for one another's cores are not a little slower, but ten times: OpenMP's wait busily. Every
    server holds a socket in Linux's abstract namespace, which ends with its process however that ends, and counts the names there.
    On another system a server takes itself for the only one.
    """

    def __init__(self, cores: int, threads: int | None = None, prefix: str = _PREFIX) -> None:
        """`threads`: so many in any case, though the others count this server. `prefix`: the same for all that share."""
        self._cores, self._threads, self._prefix = cores, threads, prefix
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if _SOCKETS.exists():
            self._socket.bind(f"\0{prefix}{uuid.uuid4().hex}")

    def __enter__(self) -> SharedCores:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    @property
    def share(self) -> int:
        """Of the cores, at least one."""
        if self._threads is not None:
            return self._threads
        sockets = _SOCKETS.read_text(errors="replace").splitlines() if _SOCKETS.exists() else []
        servers = sum(f" @{self._prefix}" in line for line in sockets)
        return max(1, self._cores // max(1, servers))
