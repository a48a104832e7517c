"""Raw completion of a text for the page's playground, token by token with the likeliest alternatives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from corolla.client.completion import CompletionDelta
from corolla.errors import CorollaError, EmptyPrompt, InvalidSetting
from corolla.gateway.bodies import StrictRoute
from corolla.gateway.error_responses import ANSWERING, kind_of, shown
from corolla.gateway.generation_tasks import GenerationRequest, GenerationTask, Notice
from corolla.gateway.message_runs import Stats
from corolla.gateway.service import Gateway, TheCaller, TheGateway, unless_gone
from corolla.gateway.sse import KEEP_ALIVE, EventStream, event
from corolla.types import GenerationSettings

router = APIRouter(prefix="/api/ui", tags=["The page"], responses=ANSWERING, route_class=StrictRoute)
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}}


class Complete(BaseModel):
    """A text, then tokens after it where an earlier answer is to go on another way."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    text: str
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=100_000)] = []
    prompt: str | None = None
    settings: dict[str, Any] = {}


@router.post("/complete", response_class=Response, responses=_EVENTS)
async def complete(http: HttpRequest, asked: Complete, gateway: TheGateway, caller: TheCaller) -> Response:
    """Go on from a text."""
    model = gateway.models.named(asked.model)
    model.check_size(asked.text)
    soft = await gateway.soft_prompt(asked.prompt, model)
    if asked.tokens and max(asked.tokens) >= model.vocabulary:
        raise InvalidSetting("tokens", f"token {max(asked.tokens)} is outside a vocabulary of {model.vocabulary}")
    text = await gateway.tasks.prepare(partial(model.tokenizer.encode, asked.text, opening=True))
    prompt = [*text, *asked.tokens]
    if not prompt:
        raise EmptyPrompt
    model.check_room(len(prompt) + (0 if soft is None else len(soft)))
    given = {name: value for name, value in asked.settings.items() if value is not None}
    settings = GenerationSettings.parse(**{"seed": gateway.new_seed(), **given, "stop_token_ids": model.stop_ids()})
    answer = gateway.tasks.begin(GenerationRequest(model=model, owner=caller.id, prompt=prompt, settings=settings, soft=soft))
    try:
        await unless_gone(http, answer.begun(gateway.config.first_token), answer)
    except CorollaError:
        answer.stop()
        raise
    return EventStream(_events(gateway, answer))


async def _events(gateway: Gateway, answer: GenerationTask) -> AsyncIterator[bytes]:
    tokenizer = answer.request.model.tokenizer
    stats = Stats(answer.began)
    try:
        yield event("start", {"prompt_tokens": len(answer.request.prompt), "queued": answer.queued})
        async for item in answer.items(gateway.config.keep_alive):
            if item is None:
                yield KEEP_ALIVE
            elif isinstance(item, Notice):
                yield event("notice", {"text": item.text})
            elif isinstance(item, CompletionDelta):
                token = item.token
                if token is not None:
                    stats.count()
                    top = [{"id": each, "text": tokenizer.spelling(each), "logprob": logprob} for each, logprob in token.top_logprobs]
                    yield event("token", {"id": token.token_id, "text": item.text, "logprob": token.logprob, "top": top})
                elif item.text:
                    yield event("token", {"id": None, "text": item.text, "logprob": None, "top": []})
        await answer.ended.wait()
        result = answer.result
        finish = None if result is None or result.finish_reason is None else result.finish_reason.value
        yield event("done", {"finish": finish, **stats.shown(result)})
    except CorollaError as error:
        gateway.metrics.failed(kind_of(error))
        yield event("error", shown(error))
    finally:
        answer.stop()
