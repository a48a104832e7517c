"""The page's routes that show something: the swarm, the soft prompts and their training."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from corolla.gateway.bodies import StrictRoute
from corolla.gateway.error_responses import ANSWERING
from corolla.gateway.model_registry import ServedModel
from corolla.gateway.service import Gateway, TheGateway
from corolla.gateway.sse import EventStream, event

router = APIRouter(prefix="/api/ui", tags=["The page"], responses=ANSWERING, route_class=StrictRoute)
_EVERY = 2.0  # seconds
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}}


@router.get("/swarm")
async def swarm(gateway: TheGateway) -> dict[str, Any]:
    """Which server holds which blocks of which model, and how they are."""
    return look(gateway)


@router.get("/swarm/events", response_class=Response, responses=_EVENTS)
async def swarm_events(gateway: TheGateway) -> Response:
    """The same, again and again."""

    async def looks() -> AsyncIterator[bytes]:
        while not gateway.closing.is_set():
            yield event("swarm", look(gateway))
            try:
                await asyncio.wait_for(gateway.closing.wait(), _EVERY)
            except TimeoutError:
                continue

    return EventStream(looks())


@router.get("/tuning")
async def tuning(gateway: TheGateway) -> dict[str, Any]:
    """The soft prompts at hand, and how they were trained."""
    found = await asyncio.to_thread(gateway.prompts.found)
    return {
        "runs": [
            {
                "id": each.id,
                "name": each.id,
                "model": each.model,
                "tokens": each.tokens,
                "deep": each.deep,
                "prompt_id": each.id if each.model is not None else None,
                "problem": each.problem,
                "tuning": each.tuning,
            }
            for each in found
        ]
    }


def look(gateway: Gateway) -> dict[str, Any]:
    """The swarm as it is known now."""
    counters: dict[str, int] = {}
    for model in gateway.models:
        for name, count in model.counters().items():
            counters[name] = counters.get(name, 0) + count
    return {
        "time": time.time(),
        "models": [_model(gateway, model) for model in gateway.models],
        "gateway": {
            "streams": gateway.queue.active,
            "waiting": gateway.queue.waiting,
            "tokens_per_second": gateway.tasks.tokens_per_second,
            **{name: counters.get(name, 0) for name in ("replays", "faults", "moves")},
        },
    }


def _model(gateway: Gateway, model: ServedModel) -> dict[str, Any]:
    round_trips = model.round_trips()
    join = shlex.join(["corolla", "serve", model.name, "--peers", gateway.config.join]) if gateway.config.join else ""
    return {
        "id": model.name,
        "blocks": model.blocks,
        "missing": [[span.start, span.end] for span in model.missing],
        "join": join + (" --secret ..." if join and gateway.config.secret else ""),
        "servers": [
            {
                "peer": record.peer,
                "name": record.name or record.peer[-8:],
                "start": record.start,
                "end": record.end,
                "state": record.state,
                "throughput": record.throughput / len(record.span),
                "sessions": record.active,
                "cache_free": record.free_tokens,
                "dtype": record.dtype,
                "weights": record.weights,
                "version": record.version,
                "next_rtts": {peer: seconds * 1000 for peer, seconds in record.round_trips.items()},
                "rtt_ms": round_trips[record.peer] * 1000 if record.peer in round_trips else None,
            }
            for record in model.records()
        ],
    }
