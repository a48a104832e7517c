"""Errors as responses: the status that means it, and a body in the manner of the interface that was asked."""

from __future__ import annotations

import math
import traceback
from typing import Any

from starlette.responses import JSONResponse

from corolla.errors import CapacityError, CorollaError, InvalidSetting, PromptTooLong

PETALS = ("/api/v1/", "/api/v2/")
OPENAI = "/v1"

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_OPENAI_CODES = {401: "invalid_api_key"}
_HTTP_KINDS = {
    400: "BadRequest",
    401: "Unauthorized",
    404: "NotFound",
    405: "MethodNotAllowed",
    415: "UnsupportedMediaType",
    422: "InvalidRequest",
}

_ABOUT = {
    400: "The request makes no sense.",
    401: "No key, or a wrong one.",
    403: "From another site, or under another name than this gateway's.",
    404: "No such thing.",
    408: "The request did not come within its time.",
    409: "It does not fit the state that the thing is in.",
    413: "Too much text.",
    422: "A value outside its range.",
    429: "Full, or too many requests: come back after Retry-After seconds.",
    500: "A fault of the gateway.",
    502: "A fault of a server that could not be gone around.",
    503: "Some blocks are held by nobody: come back after Retry-After seconds.",
    504: "No answer in time.",
    507: "The disk is full.",
}


class BadRequest(CorollaError):
    """An HTTP request that is refused before anybody looks at what it asks for."""

    def __init__(self, status: int, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or _HTTP_KINDS.get(status, "BadRequest")


def fault(error: Exception, *, debug: bool) -> BadRequest:
    """What is answered where nobody expected the error; what it says stands in the log."""
    return BadRequest(500, repr(error) if debug else "a fault of the gateway; its log says more", "Fault")


def documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: what may come of it beside success."""
    always = (400, 401, 403, 408, 413, 422, 429, 503, 507)
    return {code: {"description": _ABOUT[code]} for code in sorted({*always, *codes})}


ANSWERING = documented(404, 409, 502, 504)
"""The same for routes on which models answer."""


def kind_of(error: Exception) -> str:
    """One word for programs and metrics."""
    return error.kind if isinstance(error, BadRequest) else type(error).__name__


def shown(error: CorollaError) -> dict[str, Any]:
    """An error as an object, as the page and its streams have it."""
    return {"message": str(error), "kind": kind_of(error), "retry_after": error.retry_after if isinstance(error, CapacityError) else None}


def openai_shown(error: CorollaError) -> dict[str, Any]:
    """An error as OpenAI's interface has it."""
    status = error.status
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else _OPENAI_CODES.get(status)
    if kind_of(error) == "ModelNotFound":
        code = "model_not_found"
    return {
        "message": str(error),
        "type": _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": error.setting if isinstance(error, InvalidSetting) else None,
        "code": code,
    }


def response(path: str, error: CorollaError, *, debug: bool = False) -> JSONResponse:
    """What is answered to a request for `path`; with `debug` Petals' clients get a real traceback."""
    headers = {}
    if isinstance(error, CapacityError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body: dict[str, Any]
    if path.startswith(PETALS):
        body = {"ok": False, "traceback": petals_text(error, debug=debug)}
    elif path == OPENAI or path.startswith(f"{OPENAI}/"):
        body = {"error": openai_shown(error)}
    else:
        body = {"error": shown(error)}
    return JSONResponse(body, status_code=error.status, headers=headers)


def petals_text(error: CorollaError, *, debug: bool) -> str:
    """What Petals' `traceback` says."""
    return "".join(traceback.format_exception(error)) if debug else str(error)
