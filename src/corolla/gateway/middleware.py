"""What every request passes before a route sees it: whose it is, whether it may come from there, and how large and slow it may be."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corolla.barrier import barrier
from corolla.errors import CorollaError, Interrupted, InvalidSetting, Unauthorized
from corolla.gateway.error_responses import BadRequest, fault, kind_of, response
from corolla.gateway.fair_queue import Rates
from corolla.gateway.keys import Caller, Keys
from corolla.gateway.metrics import Metrics

COOKIE = "corolla_login"
_PROTECTED = ("/api/", "/v1/", "/metrics", "/openapi.json")
_WITHOUT_KEY = ("/api/ui/state", "/api/ui/login")
_IMPORT = "/api/ui/conversations/import"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_SAFE = ("GET", "HEAD", "OPTIONS")
_CHANGING = ("/api/v1/open_inference_session", "/api/v1/close_inference_session")  # by GET, as Petals' clients do
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_ORIGIN = re.compile(rf"([a-z][a-z0-9+.-]{{0,30}})://({_HOST.pattern})")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
access = logging.getLogger("corolla.access")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    open: bool = True  # nobody needs a key
    loopback: bool = True  # the gateway is for this machine alone: other names for it are another site's trick (DNS rebinding)
    origins: tuple[str, ...] = ()  # other sites whose pages may call
    public_url: str | None = None  # where browsers find the gateway, through a proxy: "https://chat.example.org"
    body: int = 2 * 2**20  # bytes of a request
    imported: int = 32 * 2**20  # bytes of a conversation that is imported
    read: float = 30.0  # seconds for a request to come in
    write: float = 60.0  # seconds for a client to take what it is sent


def checked_url(url: str) -> str:
    """An `AccessConfig.public_url`. Raises `InvalidSetting`."""
    found = _ORIGIN.fullmatch(url.rstrip("/"))
    if found is None or found[1] not in ("http", "https"):
        raise InvalidSetting("public-url", f"{url!r} is no address of a page: give it as https://chat.example.org, without a path")
    return found[0]


class AccessMiddleware:
    """The middleware around all routes. It leaves the caller at `scope["state"]["caller"]`."""

    def __init__(self, app: ASGIApp, config: AccessConfig, keys: Keys, rates: Rates, metrics: Metrics, *, debug: bool) -> None:
        self._app, self._config, self._keys, self._rates, self._metrics = app, config, keys, rates, metrics
        self._debug = debug
        self._public_host = (config.public_url or "").partition("://")[2]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        sent = _Sent(send, self._config.write)
        faults: list[Exception] = []
        try:
            with barrier("a request", faults.append):
                await self._answer(scope, receive, sent)
            if faults and not sent.status:
                self._metrics.failed("Fault")
                await self._refuse(scope, receive, sent, fault(faults[0], debug=self._debug))
        finally:
            sent.close()
            if scope["path"] not in ("/healthz", "/readyz"):
                access.info(
                    "request",
                    extra={
                        "client": scope["client"][0] if scope.get("client") else "",
                        "key": scope["state"]["caller"].name,
                        "method": scope.get("method", "WEBSOCKET"),
                        "path": scope["path"],
                        "status": sent.status,
                        "bytes": sent.nbytes,
                        "ms": round((time.perf_counter() - began) * 1000, 1),
                    },
                )

    async def _answer(self, scope: Scope, receive: Receive, sent: _Sent) -> None:
        state = scope.setdefault("state", {})
        state["caller"] = Caller()
        try:
            headers = Headers(scope=scope)
            self._check_origin(scope, headers)
            state["caller"] = await self._caller(scope, headers)
            if scope["type"] == "http" and scope["method"] not in _SAFE:
                receive = await self._read(scope, headers, receive)
            await self._app(scope, receive, sent)
        except CorollaError as error:
            self._metrics.failed(kind_of(error))
            await self._refuse(scope, receive, sent, error)

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Raises `BadRequest`: 400 for what is no host or no origin, 403 for another site's page."""
        host = self._host(scope, headers)
        given = headers.getlist("origin")
        if len(given) > 1 or (given and given[0] != "null" and _ORIGIN.fullmatch(given[0]) is None):
            raise BadRequest(400, "the header Origin names no site")
        changing = scope["type"] == "websocket" or scope["method"] not in _SAFE or scope["path"] in _CHANGING
        if not changing:
            return
        foreign = BadRequest(403, "pages of other sites may not call this gateway", "Forbidden")
        if given:
            allowed = (*self._config.origins, self._config.public_url)
            if given[0] not in allowed and given[0].partition("://")[2] != host:
                raise foreign
            return
        site = headers.get("sec-fetch-site")
        if site not in (None, "same-origin", "none"):
            raise foreign
        # Over plain HTTP browsers send no Sec-Fetch-Site, and no Origin with an image or a link.
        if site is None and scope["path"] in _CHANGING and headers.get("user-agent", "").startswith("Mozilla/"):
            raise foreign

    def _host(self, scope: Scope, headers: Headers) -> str:
        """The name that the request came under; empty where a client of HTTP/1.0 gives none. Raises `BadRequest`."""
        given = headers.getlist("host")
        if not given and scope["http_version"] == "1.0":
            return ""
        if len(given) != 1 or (found := _HOST.fullmatch(given[0])) is None:
            raise BadRequest(400, "the header Host names no host")
        if self._config.open and self._config.loopback and found[1].lower() not in _LOOPBACK and found[0] != self._public_host:
            raise BadRequest(
                403, f"this gateway answers as localhost alone, not as {found[0]!r}: give it keys, --open or --public-url", "Forbidden"
            )
        return found[0]

    async def _caller(self, scope: Scope, headers: Headers) -> Caller:
        path = scope["path"]
        if scope["type"] == "http" and (not path.startswith(_PROTECTED) or scope["method"] == "OPTIONS"):
            return Caller()
        caller = Caller() if self._config.open else await self._proven(headers)
        if caller is None:
            if path not in _WITHOUT_KEY:
                raise Unauthorized("give a key of this gateway: Authorization: Bearer ck-... (`corolla keys create` makes one)")
            return Caller()
        if scope["type"] == "websocket" or scope["method"] != "GET" or not path.startswith("/api/ui/"):
            self._rates.check(caller.id, caller.rate)
        return caller

    async def _proven(self, headers: Headers) -> Caller | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return await self._keys.caller(key.strip())
        cookie = cookie_of(headers)
        return None if cookie is None else await self._keys.logged_in(cookie)

    async def _read(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """All of the request's body, within its time; whoever calls `receive` then gets it at once."""
        most = self._config.imported if scope["path"] == _IMPORT else self._config.body
        too_large = BadRequest(413, f"a request has at most {most} bytes", "TooLarge")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.read):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise BadRequest(408, f"the request did not come within {self._config.read:g} s", "TooSlow") from None
        if message["type"] != "http.request":
            raise Interrupted
        first: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal first
            if first is not None:
                given, first = first, None
                return given
            return await receive()

        return replay

    async def _refuse(self, scope: Scope, receive: Receive, sent: _Sent, error: CorollaError) -> None:
        if sent.status:
            return
        answer = response(scope["path"], error)
        if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
            await sent({"type": "websocket.close", "code": 1008})
            return
        if error.status in (408, 413):
            answer.headers["Connection"] = "close"
        await answer(scope, receive, sent)


class _Sent:
    """`send`, with the headers that every response has, and a limit to how long a reader may take.

    The limit is looked at now and then, and not set anew for every token: one that takes nothing has up to twice its time.
    """

    def __init__(self, send: Callable[[Message], Awaitable[None]], seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self._loop = asyncio.get_running_loop()
        self._sending: tuple[asyncio.Task[Any], float] | None = None  # who waits for the reader, and since when
        self._timer: asyncio.TimerHandle | None = None
        self._late = False
        self.status = 0
        self.nbytes = 0

    def close(self) -> None:
        """Nothing more is sent."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._sending is None:
            return
        task, since = self._sending
        left = since + self._seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._late = True
            task.cancel()

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        elif kind == "websocket.accept":
            self.status = 101
        elif kind == "websocket.close":
            self.status = self.status or 403
        self.nbytes += len(message.get("body") or b"")
        task = asyncio.current_task()
        assert task is not None
        self._sending = task, self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._look)
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if not self._late:
                raise
            task.uncancel()
            raise BadRequest(408, "the client takes nothing more", "SlowReader") from None
        finally:
            self._sending = None


def cookie_of(headers: Headers) -> str | None:
    """The login's cookie, if there is one."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return None if morsel is None else morsel.value
