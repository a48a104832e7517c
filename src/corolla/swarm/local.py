"""The local side of the transport: clients and servers in one process, no sockets, messages by reference."""

from __future__ import annotations

from collections.abc import Callable

from corolla.errors import NetworkError
from corolla.messages import Message, Reply
from corolla.swarm.transport import Deliver

Handler = Callable[[Message, Deliver], None]
"""A server's ear: takes a message and where its replies go; may raise what `Link.send` may raise."""


class LocalTransport:
    """Peers of one process, by name. Handlers run on the sender's thread, `deliver` on whatever thread replies."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def listen(self, peer: str, handler: Handler) -> None:
        """Make `peer` reachable; a second handler of the same name takes the first one's place."""
        self._handlers[peer] = handler

    def leave(self, peer: str) -> None:
        """Make `peer` unreachable, for links that stand already too."""
        self._handlers.pop(peer, None)

    def connect(self, peer: str, deliver: Deliver) -> LocalLink:
        """A link to `peer`. Raises `NetworkError` when nobody listens under that name."""
        self.handler(peer)
        return LocalLink(self, peer, deliver)

    def handler(self, peer: str) -> Handler:
        """What `peer` listens with. Raises `NetworkError` when it does not."""
        try:
            return self._handlers[peer]
        except KeyError:
            raise NetworkError(f"no peer named {peer!r} listens in this process") from None


class LocalLink:
    """A `Link` to a peer of the same process."""

    def __init__(self, transport: LocalTransport, peer: str, deliver: Deliver) -> None:
        self._transport = transport
        self._peer = peer
        self._deliver = deliver
        self._open = True

    def send(self, message: Message) -> None:
        """See `Link.send`; also raises `NetworkError` on a closed link."""
        if not self._open:
            raise NetworkError(f"the link to {self._peer!r} is closed: connect again")
        self._transport.handler(self._peer)(message, self._reply)

    def close(self) -> None:
        """See `Link.close`."""
        self._open = False

    def _reply(self, reply: Reply) -> None:
        if self._open:
            self._deliver(reply)
