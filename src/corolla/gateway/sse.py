"""Server-sent events: how they are written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.responses import StreamingResponse

KEEP_ALIVE = b": \n\n"
KEEP_ALIVE_SECONDS = 10.0  # without an event, until a line says that the stream lives
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_encode = msgspec.json.Encoder().encode


def event(kind: str, data: Any) -> bytes:
    """One event of a kind."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode(data))


def data(content: Any) -> bytes:
    """One event without a kind, as OpenAI's interface has them."""
    return b"data: %b\n\n" % _encode(content)


class EventStream(StreamingResponse):
    """Events as a response."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers=_HEADERS)
