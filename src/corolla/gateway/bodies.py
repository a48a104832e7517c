"""Requests' bodies in JSON, read strictly: no NaN, no number beyond a float, no half of a surrogate pair, no bottomless nesting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

_LARGE = 2**18  # bytes; more of them are read beside the event loop


def decoded(body: bytes | str) -> Any:
    """What a text in JSON says. Raises `ValueError`."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return await asyncio.to_thread(decoded, body) if len(body) > _LARGE else decoded(body)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class StrictRoute(APIRoute):
    """For a router's `route_class`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly
