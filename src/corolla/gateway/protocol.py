"""uvicorn's HTTP protocol with bounds to a connection: how long it may keep a request back, how large its headers are, and how many
one address has.

Where an address has all the connections that it may have, a new one takes the place of one that says nothing. Where each of
them has a request under way, the new one is answered 503, but for `/healthz` and `/readyz`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from corolla.errors import CapacityError
from corolla.gateway.error_responses import response

_VITAL = (b"/healthz", b"/readyz")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    headers: float = 20.0  # seconds until a request's headers are there
    rest: float = 40.0  # seconds for what follows them; `AccessConfig.read` ends sooner, with an answer
    idle: int = 30  # seconds that a connection stays open after an answer
    bytes: int = 64 * 2**10  # of a request's line and headers
    of_one: int = 256  # connections of one address, or of one network of IPv6 (/64)
    in_all: int = 1024
    proxies: tuple[str, ...] = ()  # their connections are many clients': only the limit for all of them holds there


class BoundedHTTP(HttpToolsProtocol):
    """One connection. uvicorn makes it with `partial(BoundedHTTP, limits)`."""

    def __init__(self, limits: ConnectionLimits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._receiving = False  # a request, that is not whole yet
        self._header_bytes: int | None = 0  # that have come; None after the last one
        self._crowded = False
        self._unsent = 0  # bytes that the client had not taken when it was last looked at
        self.quiet_since = 0.0

    @property
    def rank(self) -> tuple[bool, float] | None:
        """Who goes first where a place is needed: the lowest. None while an answer is under way."""
        if self.cycle is None or self.cycle.response_complete:
            return False, self.quiet_since
        return (True, self.quiet_since) if self.cycle.more_body else None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.quiet_since = self.loop.time()
        self._wait_for(self._limits.headers)
        self._crowded = not self._find_place()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for(None)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None:
            self._wait_for(self._limits.headers)  # also where it is no more than an empty line
        if self._header_bytes is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes is not None and self._header_bytes > self._limits.bytes and not self.transport.is_closing():
            self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving, self._header_bytes = True, 0
        if self._deadline is None:
            self._wait_for(self._limits.headers)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._limits.bytes:
            raise ValueError("too many headers")  # which the parser turns into 400
        self._header_bytes = None
        self.app = _full if self._crowded and self.url.partition(b"?")[0] not in _VITAL else self.config.loaded_app
        super().on_headers_complete()
        self._wait_for(self._limits.rest)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving = False
        self._wait_for(None)

    def on_response_complete(self) -> None:
        self.quiet_since = self.loop.time()
        super().on_response_complete()

    def handle_websocket_upgrade(self) -> None:
        self._wait_for(None)
        if self._crowded:
            self.transport.close()
        else:
            super().handle_websocket_upgrade()

    def timeout_keep_alive_handler(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent == self._unsent:
            self.transport.abort()
            return
        self._unsent = unsent  # a slow reader's: it may have the rest of its answer
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _wait_for(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._deadline = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._receiving or not answering:  # else what came were blanks behind a request, and its answer is under way
            self.transport.abort()

    def _find_place(self) -> bool:
        """Whether this connection may be one more; somebody silent may have to go for it."""
        limits, mine = self._limits, _source(self)
        living = [each for each in self.connections if not each.transport.is_closing()]
        sources = Counter(map(_source, living))
        if mine not in limits.proxies and sources[mine] > limits.of_one:
            crowd = mine
        elif sources.total() > limits.in_all:
            crowd = max(sources, key=sources.__getitem__)
        else:
            return True
        silent = [
            (rank, each)
            for each in living
            if each is not self and isinstance(each, BoundedHTTP) and _source(each) == crowd and (rank := each.rank) is not None
        ]
        if not silent:
            return False
        _, going = min(silent, key=lambda pair: pair[0])
        going.transport.abort()
        return True


def _source(connection: Any) -> str:
    return _network(connection.client[0]) if connection.client else ""


@lru_cache(maxsize=4096)
def _network(host: str) -> str:
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return host if address.is_loopback else str(ip_network((address, 64), strict=False))
    return host


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    answer = response(scope["path"], CapacityError("your address has as many requests under way as it may: try again in 1 s", 1.0))
    answer.headers["Connection"] = "close"
    await answer(scope, receive, send)
