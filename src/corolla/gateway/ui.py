"""The page's own routes: state, login and conversations. docs/api.md describes them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

import corolla
from corolla.chat.templates import TEMPLATES
from corolla.errors import CorollaError, EmptyPrompt
from corolla.gateway.bodies import StrictRoute
from corolla.gateway.error_responses import ANSWERING
from corolla.gateway.inference import SETTINGS
from corolla.gateway.keeping import EVERY
from corolla.gateway.keys import LOGIN_SECONDS
from corolla.gateway.message_runs import MessageRuns, TheRuns, chat_settings
from corolla.gateway.middleware import COOKIE, cookie_of
from corolla.gateway.model_registry import ServedModel
from corolla.gateway.service import Gateway, TheCaller, TheGateway
from corolla.gateway.sse import KEEP_ALIVE, EventStream, event

router = APIRouter(prefix="/api/ui", tags=["The page"], responses=ANSWERING, route_class=StrictRoute)
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}}
_WHOLE: dict[str, Any] = {"description": "The conversation with its messages.", "content": {"application/json": {}}}
_SOON, _TRIES = 0.05, 20  # seconds, and how often
_NAME = Annotated[str, Field(max_length=200)]
_TEXT = Annotated[str, Field(max_length=4_000_000)]
_ID = Annotated[str, Field(max_length=64)]


class Login(BaseModel):
    key: Annotated[str, Field(max_length=256)]


class ConversationBody(BaseModel):
    """What can be said of a conversation; what is left out stays as it is, null is the model's own."""

    model_config = ConfigDict(extra="forbid")

    title: _NAME | None = None
    model: _NAME | None = None
    system: _TEXT | None = None
    template: _NAME | None = None
    prompt: _NAME | None = None
    settings: dict[str, Any] | None = None
    leaf: _ID | None = None


class NewConversation(ConversationBody):
    text: _TEXT | None = None


class Question(BaseModel):
    text: _TEXT
    parent: _ID | None = None


class ImportedMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: _ID
    parent: _ID | None = None
    role: Literal["user", "assistant"]
    text: _TEXT
    state: Literal["done", "writing", "stopped", "interrupted", "failed"] | None = None
    finish: Literal["stop", "length"] | None = None
    stats: dict[str, Any] | None = None
    error: _TEXT | None = None
    notices: Annotated[list[str], Field(max_length=100)] | None = None


class Imported(ConversationBody):
    model_config = ConfigDict(extra="ignore")

    messages: list[ImportedMessage]


@router.get("/state")
async def state(gateway: TheGateway, caller: TheCaller) -> dict[str, Any]:
    """What the page needs first."""
    is_open = gateway.config.access.open
    login = "none" if is_open else "done" if caller.id else "needed"
    shown = login != "needed"
    return {
        "version": corolla.__version__,
        "login": login,
        "name": caller.name or None,
        "models": [_model(model) for model in gateway.models] if shown else [],
        "templates": [{"name": each.name, "about": each.about, "system": each.system} for each in TEMPLATES.values()] if shown else [],
        "prompts": await _prompts(gateway) if shown else [],
        "settings": SETTINGS if shown else [],
    }


async def _prompts(gateway: Gateway) -> list[dict[str, Any]]:
    return [
        {"id": each.id, "name": each.id, "model": each.model, "tokens": each.tokens, "deep": each.deep}
        for each in await asyncio.to_thread(gateway.prompts.found)
        if each.tokens is not None
    ]


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "family": model.family,
        "blocks": model.blocks,
        "context": model.context_length,
        "vocabulary": model.vocabulary,
        "template": model.template.name,
    }


@router.post("/login", status_code=204)
async def login(asked: Login, http: HttpRequest, gateway: TheGateway) -> Response:
    """Exchange a key for a cookie."""
    cookie = await gateway.keys.log_in(asked.key)
    response = Response(status_code=204)
    secure = http.url.scheme == "https" or (gateway.config.access.public_url or "").startswith("https:")
    response.set_cookie(COOKIE, cookie, max_age=LOGIN_SECONDS, httponly=True, samesite="strict", secure=secure, path="/")
    return response


@router.post("/logout", status_code=204)
async def logout(http: HttpRequest, gateway: TheGateway) -> Response:
    """The cookie is worth nothing any more."""
    if (cookie := cookie_of(http.headers)) is not None:
        await gateway.keys.log_out(cookie)
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, path="/")
    return response


@router.get("/conversations")
async def conversations(
    gateway: TheGateway,
    caller: TheCaller,
    query: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[str | None, Query(max_length=100)] = None,
) -> dict[str, Any]:
    """The caller's conversations, the latest first."""
    return await gateway.conversations.search(caller.id, query, limit, before)


@router.post("/conversations", status_code=201)
async def create(asked: NewConversation, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> dict[str, Any]:
    """A new conversation, and its first question if there is a `text`: then there is none where that cannot be answered."""
    values = _checked(gateway, asked.model_dump(exclude_unset=True, exclude={"leaf", "text"}))
    if asked.text is None:
        return {**await gateway.conversations.create(caller.id, values), "messages": []}
    made = await gateway.conversations.create(caller.id, values)
    try:
        begun = await ask(made["id"], Question(text=asked.text), gateway, runs, caller)
    except CorollaError:
        await gateway.conversations.delete(caller.id, made["id"])
        raise
    return {**await gateway.conversations.get(caller.id, made["id"]), **begun}


@router.post("/conversations/import", status_code=201, response_class=Response, responses={201: _WHOLE})
async def import_conversation(asked: Imported, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> Response:
    """A conversation that was exported, as a new one."""
    values = await asyncio.to_thread(asked.model_dump)
    if values["model"] not in [model.name for model in gateway.models]:
        values["model"] = None  # it is served elsewhere; here it goes on with what there is
    values |= _checked(gateway, {"settings": values["settings"] or {}, "template": values["template"]})
    return _whole(gateway, runs, await gateway.conversations.import_one(caller.id, values), status_code=201)


@router.get("/conversations/{conversation}", response_class=Response, responses={200: _WHOLE})
async def get(conversation: str, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> Response:
    """A conversation with all its messages."""
    return _whole(gateway, runs, await gateway.conversations.get(caller.id, conversation))


@router.patch("/conversations/{conversation}")
async def change(conversation: str, asked: ConversationBody, gateway: TheGateway, caller: TheCaller) -> dict[str, Any]:
    """Rename it, or change how it goes on."""
    return await gateway.conversations.change(caller.id, conversation, _checked(gateway, asked.model_dump(exclude_unset=True)))


@router.delete("/conversations/{conversation}", status_code=204)
async def delete(conversation: str, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> Response:
    """Delete it; an answer that is being written stops."""
    for message in await gateway.conversations.delete(caller.id, conversation):
        runs.stop(message)
    return Response(status_code=204)


@router.get("/conversations/{conversation}/export", response_class=Response, responses={200: _WHOLE})
async def export(conversation: str, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> Response:
    """A conversation as a file."""
    known = await gateway.conversations.get(caller.id, conversation)
    name = re.sub(r"[^A-Za-z0-9]+", "-", known["title"]).strip("-")[:60] or "conversation"
    return _whole(gateway, runs, known, headers={"Content-Disposition": f'attachment; filename="{name}.json"'})


def _whole(gateway: Gateway, runs: MessageRuns, conversation: dict[str, Any], **options: Any) -> Response:
    """A conversation with its messages, a page of them after the other: all may be many megabytes."""

    async def pieces() -> AsyncIterator[bytes]:
        yield json.dumps(conversation).encode()[:-1] + b', "messages": ['
        before = b"\n"
        async for page in gateway.conversations.pages(conversation["id"]):
            for message in page:
                if (run := runs.get(message["id"])) is not None:
                    message["text"] = run.text
                yield before + json.dumps(message).encode()
                before = b",\n"
        yield b"\n]}\n"

    return StreamingResponse(pieces(), media_type="application/json", **options)


@router.post("/conversations/{conversation}/messages", status_code=202)
async def ask(conversation: str, asked: Question, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> dict[str, Any]:
    """Ask something: at the end of the branch that is looked at, or after `parent`."""
    if not asked.text.strip():
        raise EmptyPrompt
    runs.check(caller.id)
    at_leaf = "parent" not in asked.model_fields_set
    question, answer = await gateway.conversations.add_question(caller.id, conversation, asked.parent, asked.text, at_leaf=at_leaf)
    await runs.begin(caller.id, conversation, answer)
    return {"user": question, "answer": answer}


@router.post("/messages/{message}/regenerate", status_code=202)
async def regenerate(message: str, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> dict[str, Any]:
    """Another answer to the same question, beside this one."""
    runs.check(caller.id)
    conversation, answer = await gateway.conversations.add_answer(caller.id, message)
    await runs.begin(caller.id, conversation, answer)
    return {"answer": answer}


@router.post("/messages/{message}/resume", status_code=202)
async def resume(message: str, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> dict[str, Any]:
    """Go on with an answer that ended before its end."""
    runs.check(caller.id)
    conversation, answer = await gateway.conversations.reopen(caller.id, message)
    await runs.begin(caller.id, conversation, answer)
    return {"answer": answer}


@router.post("/messages/{message}/stop", status_code=204)
async def stop(message: str, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> Response:
    """End an answer where it is."""
    await gateway.conversations.check_writer(caller.id, message)
    runs.stop(message)
    return Response(status_code=204)


@router.get("/messages/{message}/events", response_class=Response, responses=_EVENTS)
async def events(message: str, gateway: TheGateway, runs: TheRuns, caller: TheCaller) -> Response:
    """How an answer gets on."""
    for _ in range(_TRIES):
        run = runs.get(message)
        if run is not None and run.answer.request.owner == caller.id:
            return EventStream(run.watch(gateway.config.keep_alive, gateway.closing))
        known = await gateway.conversations.message(caller.id, message)
        if known["state"] != "writing":
            break
        await asyncio.sleep(_SOON)  # it is about to begin, or just being kept
    return EventStream(_followed(gateway, caller.id, known))


async def _followed(gateway: Gateway, owner: str, known: dict[str, Any]) -> AsyncIterator[bytes]:
    """The events of an answer that has ended, or that another gateway writes: as it is saved."""
    yield event("snapshot", {"text": known["text"], "tokens": (known["stats"] or {}).get("tokens", 0), "state": known["state"]})
    while known["state"] == "writing" and not gateway.closing.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(gateway.closing.wait(), EVERY)
        before = known["text"]
        try:
            known = await gateway.conversations.message(owner, known["id"])
        except CorollaError:
            break  # it was deleted, or cannot be read now: this is what is known
        if known["text"] != before and known["text"].startswith(before):
            stats = {name: (known["stats"] or {}).get(name) for name in ("tokens", "tokens_per_second", "ttft")}
            yield event("delta", {"text": known["text"][len(before) :], **stats})
        else:
            yield KEEP_ALIVE
    yield event("done", {"message": known})


def _checked(gateway: Gateway, values: dict[str, Any]) -> dict[str, Any]:
    """The same values, if a conversation can have them. Raises `ModelNotFound`, `InvalidSetting`."""
    model = gateway.models.named(values.get("model"))
    template = model.template_or_default(values.get("template"))
    if "settings" in values:
        values["settings"] = {name: value for name, value in (values["settings"] or {}).items() if value is not None}
        chat_settings(values["settings"], template, model)
    if values.get("title", "") is None:
        values["title"] = ""
    return values
