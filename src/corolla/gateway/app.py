"""The application: all routes behind the access middleware, errors as responses, the page's files."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

import corolla
from corolla.barrier import barrier
from corolla.errors import CorollaError, InvalidSetting
from corolla.gateway import openai_chat, openai_completions, petals, petals_socket, playground, ui, ui_looks
from corolla.gateway.error_responses import BadRequest, documented, fault, kind_of, response
from corolla.gateway.message_runs import MessageRuns
from corolla.gateway.middleware import AccessMiddleware
from corolla.gateway.openai import router as openai
from corolla.gateway.service import Gateway, TheGateway

STATIC = Path(__file__).parent / "static"
_NO_PAGE = (
    "The page is not built in this checkout: run `npm ci && npm run build` in web/, or install a wheel. "
    "The interfaces work: see docs/api.md.\n"
)
_VIEWS = re.compile(r"(c/[^/]+|playground|swarm|tuning)?/?")  # the page's own paths, each the same file
__all__ = ["gateway_app", "openai_chat", "openai_completions"]  # the last two add their routes to OpenAI's as they are imported


def gateway_app(gateway: Gateway, *, static: Path = STATIC) -> ASGIApp:
    """The ASGI application of a gateway."""
    runs = MessageRuns(gateway)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.keeper.start()
        tasks = [asyncio.create_task(gateway.keeper.run()), asyncio.create_task(_prune(gateway))]
        yield
        await gateway.close()
        await runs.settle()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await gateway.keeper.close()

    app = FastAPI(title="Corolla", version=corolla.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    app.state.message_runs = runs
    for router in (openai, petals.router, petals_socket.router, ui.router, ui_looks.router, playground.router):
        app.include_router(router)
    _add_operations(app)
    _add_errors(app, gateway)
    _add_page(app, static)
    guarded: ASGIApp = AccessMiddleware(
        app, gateway.config.access, gateway.keys, gateway.rates, gateway.metrics, debug=gateway.config.debug
    )
    if gateway.config.access.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(gateway.config.access.origins), allow_methods=["*"], allow_headers=["Authorization", "Content-Type"]
        )
    return guarded


async def _prune(gateway: Gateway) -> None:
    while True:
        await asyncio.sleep(30)
        with barrier("closing idle sessions"):
            await asyncio.to_thread(gateway.tasks.pool.prune)


def _add_operations(app: FastAPI) -> None:
    @app.get("/healthz", tags=["Operations"], response_class=PlainTextResponse)
    async def alive() -> str:
        """Whether the gateway lives."""
        return "ok\n"

    @app.get("/readyz", tags=["Operations"], responses=documented(503))
    async def ready(gateway: TheGateway) -> Response:
        """Whether answers can be given: every block of every model has a server that is ready, and network and database work."""
        missing = {model.name: [str(span) for span in model.missing] for model in gateway.models if model.missing}
        faults = gateway.faults
        content: dict[str, Any] = {"ready": not faults, "missing": missing, "ending": gateway.closing.is_set(), "faults": faults}
        return JSONResponse(content, status_code=503 if faults else 200)

    @app.get("/metrics", tags=["Operations"], response_class=PlainTextResponse, responses=documented())
    async def metrics(gateway: TheGateway) -> Response:
        """For Prometheus."""
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    def answer(request: Request, error: CorollaError) -> Response:
        gateway.metrics.failed(kind_of(error))
        return response(request.url.path, error, debug=gateway.config.debug)

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, CorollaError)
        return answer(request, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        if first["type"] == "json_invalid":
            return answer(request, BadRequest(400, "the body is no JSON"))
        return answer(request, InvalidSetting(place or "body", first["msg"]))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        given = answer(request, BadRequest(error.status_code, str(error.detail)))
        given.headers.update(error.headers or {})
        return given

    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(request, fault(error, debug=gateway.config.debug))  # AccessMiddleware's barrier logs it

    for kind, handler in ((CorollaError, ours), (RequestValidationError, invalid), (HTTPException, http), (Exception, unexpected)):
        app.add_exception_handler(kind, handler)


def _add_page(app: FastAPI, static: Path) -> None:
    root = static.resolve()

    @app.get("/{path:path}", include_in_schema=False)
    async def page(path: str) -> Response:
        """The page and its files. Any other path is none: clients of other servers ask for routes of those, to see what this one is."""
        if not (root / "index.html").is_file():
            if path:
                raise HTTPException(404, "there is no such route")
            return PlainTextResponse(_NO_PAGE)
        if path and (file := _file(root, path)) is not None:
            lasting = "public, max-age=31536000, immutable" if path.startswith("assets/") else "no-cache"  # assets' names change with them
            return FileResponse(file, headers={"Cache-Control": lasting})
        if _VIEWS.fullmatch(path) is None:
            raise HTTPException(404, "there is no such route")
        return FileResponse(root / "index.html", headers={"Cache-Control": "no-cache"})


def _file(root: Path, path: str) -> Path | None:
    """The file below `root`, if there is one."""
    try:
        file = (root / path).resolve()
        return file if file.is_file() and file.is_relative_to(root) else None
    except (OSError, ValueError):  # a name that no file can have
        return None
