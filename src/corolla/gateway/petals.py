"""Petals Chat's interface over HTTP (v1), as chat.petals.dev documents it: a form, a query or JSON in, `ok` and `outputs` out.

What Petals answered with status 200 and a traceback has a status of its own here.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request as HttpRequest

from corolla.errors import CallerError, EmptyPrompt, InvalidSetting, PromptTooLong
from corolla.gateway.bodies import StrictRoute
from corolla.gateway.error_responses import ANSWERING, BadRequest
from corolla.gateway.generation_tasks import GenerationRequest
from corolla.gateway.model_registry import ServedModel
from corolla.gateway.pool import PooledSession
from corolla.gateway.service import Gateway, TheCaller, TheGateway, unless_gone
from corolla.types import GenerationSettings

router = APIRouter(prefix="/api/v1", tags=["Petals"], responses=ANSWERING, route_class=StrictRoute)


class Inference(BaseModel):
    """How an answer is made; `max_length` counts the session's tokens, the inputs among them."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    inputs: str | None = Field(None, description="The text to go on from; may be left out to go on in a session.")
    do_sample: Annotated[int, Field(ge=0, le=1)] = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_length: Annotated[int | None, Field(ge=1)] = None
    max_new_tokens: Annotated[int | None, Field(ge=1)] = None

    def settings(self, room: int, **more: Any) -> GenerationSettings:
        """For an answer of at most `room` tokens. Raises `InvalidSetting`."""
        if not self.do_sample:  # then Petals ignores them
            self.temperature = self.top_k = self.top_p = None
        return GenerationSettings.parse(
            do_sample=bool(self.do_sample),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=room,
            seed=uuid.uuid4().int % 2**31 if self.do_sample else None,
            **more,
        )

    def room(self, prompt: int, most: int) -> int:
        """How many tokens an answer after `prompt` tokens may have, where `most` are held in all.

        Raises `InvalidSetting`, and `PromptTooLong` where there is no room.
        """
        if (self.max_length is None) == (self.max_new_tokens is None):
            raise InvalidSetting("max_new_tokens", "give either max_length or max_new_tokens")
        if prompt >= most:
            raise PromptTooLong(prompt, most)
        if self.max_new_tokens is not None:
            return min(self.max_new_tokens, most - prompt)
        assert self.max_length is not None
        if self.max_length <= prompt:
            raise InvalidSetting("max_length", f"{self.max_length} leaves no room after {prompt} tokens of the session and its inputs")
        return min(self.max_length, most) - prompt


class Generate(Inference):
    session_id: str | None = None


class Outputs(BaseModel):
    ok: bool = True
    outputs: str


class Opened(BaseModel):
    ok: bool = True
    session_id: str


class Done(BaseModel):
    ok: bool = True


async def tokens_of(gateway: Gateway, model: ServedModel, text: str | None, before: Sequence[int]) -> list[int]:
    """What a session's tokens are with these inputs. Raises `EmptyPrompt`, `PromptTooLong`."""
    new: list[int] = []
    if text:
        model.check_size(text)
        new = await gateway.tasks.prepare(partial(model.tokenizer.encode, text, opening=not before))
    prompt = [*before, *new]
    if not prompt:
        raise EmptyPrompt
    return prompt


@router.get("/open_inference_session")
async def open_inference_session(
    gateway: TheGateway, caller: TheCaller, max_length: Annotated[int, Query(ge=1)], model: str | None = None
) -> Opened:
    """Open a session that holds at most so many tokens."""
    return Opened(session_id=gateway.sessions.open(gateway.models.named(model), caller.id, max_length).id)


@router.get("/close_inference_session")
async def close_inference_session(gateway: TheGateway, caller: TheCaller, session_id: str) -> Done:
    """Close a session."""
    gateway.sessions.close(gateway.sessions.get(session_id, caller.id))
    return Done()


_BODY = {
    "required": False,
    "content": {kind: {"schema": Generate.model_json_schema()} for kind in ("application/json", "application/x-www-form-urlencoded")},
}


@router.post("/generate", openapi_extra={"requestBody": _BODY})
async def generate(request: HttpRequest, gateway: TheGateway, caller: TheCaller) -> Outputs:
    """Go on from a text, or in a session. The options come as a form, in the query or as JSON."""
    asked = await _asked(request)
    if asked.session_id is None:
        model = gateway.models.named(asked.model)
        outputs, _ = await _answer(request, gateway, model, caller.id, asked, [], model.context_length, None)
        return Outputs(outputs=outputs)
    session = gateway.sessions.get(asked.session_id, caller.id)
    if asked.model is not None and gateway.models.named(asked.model) is not session.model:
        raise CallerError(f"the session is one of model {session.model.name}")

    async def in_turn() -> str:
        async with session.lock:
            gateway.sessions.get(session.id, caller.id)  # it may have been closed meanwhile
            outputs, session.tokens = await _answer(
                request, gateway, session.model, caller.id, asked, session.tokens, session.most, session.kept
            )
        return outputs

    return Outputs(outputs=await in_turn())


async def _answer(
    request: HttpRequest,
    gateway: Gateway,
    model: ServedModel,
    owner: str,
    asked: Generate,
    before: Sequence[int],
    most: int,
    kept: PooledSession | None,
) -> tuple[str, list[int]]:
    """The answer's text, and all tokens of the session after it."""
    prompt = await tokens_of(gateway, model, asked.inputs, before)
    settings = asked.settings(asked.room(len(prompt), most), stop_token_ids=model.stop_ids())
    answer = gateway.tasks.begin(GenerationRequest(model=model, owner=owner, prompt=prompt, settings=settings, session=kept))
    result = await unless_gone(request, answer.whole(), answer)
    return result.text, [*prompt, *result.token_ids]


async def _asked(request: HttpRequest) -> Generate:
    """The options, wherever they stand; in the body they win."""
    given: dict[str, Any] = dict(request.query_params)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            body = await request.json()
        except ValueError:
            raise BadRequest(400, "the body is no JSON") from None
        if not isinstance(body, dict):
            raise BadRequest(422, "the body is no JSON object")
        given |= body
    elif kind in ("application/x-www-form-urlencoded", "multipart/form-data"):
        given |= {name: value for name, value in (await request.form()).items() if isinstance(value, str)}
    try:
        return Generate.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidSetting(".".join(map(str, first["loc"])) or "body", first["msg"]) from None
