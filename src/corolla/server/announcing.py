"""What a server says of itself, said again and again until it is withdrawn; and which other servers it measures its way to."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from corolla.barrier import barrier
from corolla.errors import CorollaError, NetworkError
from corolla.swarm.network import Network
from corolla.swarm.records import ServerRecord

NEIGHBOURS = 16  # servers whose round trips are measured and announced
_NEWCOMERS = 4  # of them that are asked at random, lest a near one is never found
log = logging.getLogger(__name__)
_FIRST_WITHIN, _AGAIN_AFTER = 15.0, 0.5  # seconds


class Peer(Protocol):
    """This process in a swarm, as a server needs it; see `swarm.peer.SwarmPeer`."""

    @property
    def network(self) -> Network: ...

    @property
    def addresses(self) -> list[str]: ...

    @property
    def failure(self) -> str | None: ...

    @property
    def reachable(self) -> bool | None: ...

    def servers(self, model: str | None = None) -> list[ServerRecord]: ...

    def publish(self, record: ServerRecord) -> None: ...

    def withdraw(self) -> None: ...

    def close(self) -> None: ...


class Announcer:
    """Publishes what `describe` gives every `every` seconds and whenever `now` is called, until `withdraw`.

    Raises `NetworkError` when the first announcement does not go out.
    """

    def __init__(self, peer: Peer, describe: Callable[[], ServerRecord], every: float) -> None:
        self._peer, self._describe, self._every = peer, describe, every
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._begin()
        self._thread = threading.Thread(target=self._run, name="corolla-announce", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        """The first announcement: where nodes have just started, nobody may be there to take it for a while."""
        deadline = time.monotonic() + _FIRST_WITHIN
        while True:
            try:
                self._peer.publish(self._describe())
                return
            except NetworkError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_AGAIN_AFTER)

    def now(self) -> None:
        """Announce at once. What does not go out now goes out later, also what a clock that was stepped makes impossible now."""
        with self._lock:
            if self._ended.is_set():
                return
            try:
                self._peer.publish(self._describe())
            except CorollaError as error:
                log.warning("the announcement did not go out: %s", error)

    def withdraw(self) -> None:
        """Take the record out of the directory, for good. Doing it twice is no error."""
        with self._lock:  # an announcement under way must not come after it
            if self._ended.is_set():
                return
            self._ended.set()
            try:
                self._peer.withdraw()
            except CorollaError as error:
                log.warning("the record was not withdrawn, and expires by itself: %s", error)
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            with barrier("the announcer"):
                self.now()


def next_servers(records: Iterable[ServerRecord], me: ServerRecord) -> list[str]:
    """The peers that a session's rows may go to from the server `me`: those that hold a block behind one of its own and, as
    tokens go from the head back to the embedding, those that embed where it samples."""
    return [
        record.peer
        for record in records
        if record.peer != me.peer
        and record.blocks == me.blocks
        and ((record.start <= me.end and record.end > me.start + 1) or (me.heads and record.embeds))
    ]


def nearest(peers: Iterable[str], round_trips: Mapping[str, float]) -> dict[str, float]:
    """The known round trips of the nearest `NEIGHBOURS` among `peers`."""
    known = sorted((round_trips[peer], peer) for peer in set(peers) if peer in round_trips)
    return {peer: seconds for seconds, peer in known[:NEIGHBOURS]}


def to_ask(peers: Iterable[str], round_trips: Mapping[str, float], chance: random.Random) -> list[str]:
    """At most `NEIGHBOURS` of `peers` whose round trips to measure now: the nearest, and some by chance that may be nearer."""
    among = sorted(set(peers))
    near = list(nearest(among, round_trips))[: NEIGHBOURS - _NEWCOMERS]
    others = [peer for peer in among if peer not in near]
    return near + chance.sample(others, min(len(others), NEIGHBOURS - len(near)))
