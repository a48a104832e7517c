"""Soft prompts and adapters on their way to servers: who should have which, and who is still being sent one."""

from __future__ import annotations

import time
from itertools import count

from corolla.client.peers import Recent
from corolla.messages import Ping, Pong
from corolla.swarm.convert import from_adapter_part, from_prompt_part
from corolla.swarm.network import Network
from corolla.types import AdapterPart, PromptPart, Span

_SLOWEST = 128 * 2**10  # bytes a second that every link between peers carries, as in `swarm.p2p`
_OWN_PINGS = 2**32  # and above: those that do not measure a round trip
_MOST = 256  # prompts and adapters that are remembered for a peer; a forgotten one is sent again


class Parts:
    """For any thread; each is sent once to a peer that does not say that it lacks it."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._given: Recent[Recent[None]] = Recent()  # names and blocks, by peer
        # Until when adapters may be on their way to a peer, and the ping behind the last of them.
        self._carrying: Recent[tuple[float, int]] = Recent()
        self._pings = count(_OWN_PINGS)

    def give(self, peer: str, part: PromptPart) -> None:
        """Send a soft prompt to `peer`, unless it should have it."""
        if self._is_new(peer, part.name.name, part.span):
            self._network.send(peer, from_prompt_part(part))

    def give_adapter(self, peer: str, part: AdapterPart) -> None:
        """Send an adapter, or a part of it, to `peer`, unless it should have it."""
        if not self._is_new(peer, part.digest, part.span):
            return
        known, nonce = self._carrying.get(peer), next(self._pings)
        until = max(time.monotonic(), known[0] if known is not None else 0.0)
        for frame in from_adapter_part(part):
            until += frame.hidden.nbytes / _SLOWEST
            self._carrying.put(peer, (until, nonce))
            self._network.send(peer, frame)
        self._network.send(peer, Ping(nonce))

    def carrying(self, peer: str) -> bool:
        """Whether an adapter may still be on its way to `peer`, which answers nothing until it is there."""
        known = self._carrying.get(peer)
        return known is not None and known[0] > time.monotonic()

    def arrived(self, peer: str, pong: Pong) -> None:
        """`peer` answered a ping: all that was sent before that is there."""
        known = self._carrying.get(peer)
        if known is not None and known[1] == pong.nonce:
            self._carrying.pop(peer)

    def lacks(self, peer: str) -> None:
        """`peer` has forgotten what it was given."""
        self._given.pop(peer)

    def lose(self, peer: str) -> None:
        """The connection to `peer` broke."""
        self.lacks(peer)
        self._carrying.pop(peer)

    def _is_new(self, peer: str, name: str, span: Span) -> bool:
        given = self._given.get(peer) or Recent(_MOST)
        self._given.put(peer, given)
        key = f"{name} {span}"
        new = key not in given
        given.put(key, None)
        return new
