"""uvicorn's HTTP protocol, with a limit to how long a connection may say nothing before its first request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

FIRST_REQUEST = 20.0  # seconds for its line and headers


class PatientHTTP(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """Closes connections whose first request does not come; uvicorn itself waits for it for ever."""

    first_request = FIRST_REQUEST

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(self.first_request, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and self.transport.get_protocol() is self:  # else a WebSocket has taken the connection over
            self.transport.close()
