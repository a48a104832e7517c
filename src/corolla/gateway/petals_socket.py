"""Petals Chat's interface over a WebSocket (v2): a session for as long as the socket is open, and outputs as they are written.

Requests are `{"type": "open_inference_session", "max_length": n}`, then any number of `{"type": "generate", "inputs": ...}`.
With a `stop_sequence` an answer goes on until it ends with that (or one of `extra_stop_sequences`), and comes in pieces of
`max_new_tokens` tokens; the piece that ends with it has `stop`. Without one there is one piece.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from corolla.barrier import barrier
from corolla.client.completion import CompletionDelta
from corolla.errors import CallerError, CorollaError, InvalidSetting
from corolla.gateway.bodies import decoded
from corolla.gateway.error_responses import fault, kind_of, petals_text
from corolla.gateway.generation_tasks import GenerationRequest, GenerationTask
from corolla.gateway.open_sessions import OpenSession
from corolla.gateway.petals import Inference, tokens_of
from corolla.gateway.service import Gateway, caller_of, gateway_of
from corolla.types import FinishReason

router = APIRouter()
_MOST_STOPS = 16
_MOST_WAITING = 8  # requests that a client may send ahead
_TICK = 60.0  # seconds; nothing is said while nothing comes, for the socket has pings of its own
_INVALID = 1008  # the close code after an error of the caller's
_FAULT = 1011  # and after one that is not


class Open(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_length: int = Field(ge=1)


class SocketGenerate(Inference):
    stop_sequence: str | None = Field(None, min_length=1)
    extra_stop_sequences: list[str] | None = Field(None, max_length=_MOST_STOPS)


class SocketInbox:
    """What the client sends, read as it comes, so that its going away is noticed while an answer is written."""

    def __init__(self, socket: WebSocket) -> None:
        self.gone = asyncio.Event()
        self._requests: asyncio.Queue[dict[str, Any] | CallerError | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(socket))

    async def next(self) -> dict[str, Any]:
        """The next request. Raises `CallerError` for what is none, `WebSocketDisconnect`."""
        request = await self._requests.get()
        if request is None:
            raise WebSocketDisconnect
        if isinstance(request, CallerError):
            raise request
        return request

    def close(self) -> None:
        self._task.cancel()

    async def _read(self, socket: WebSocket) -> None:
        with barrier("a WebSocket's requests"):
            while (message := await socket.receive())["type"] != "websocket.disconnect":
                self._take(message.get("text") or message.get("bytes") or b"")
        self.gone.set()
        self._requests.put_nowait(None)

    def _take(self, message: str | bytes) -> None:
        try:
            request = decoded(message)
        except ValueError:
            request = None
        if self._requests.qsize() < _MOST_WAITING:
            self._requests.put_nowait(request if isinstance(request, dict) else CallerError("a request is one JSON object"))
        elif self._requests.qsize() == _MOST_WAITING:  # what comes after is not kept, but read: to see the client go away
            self._requests.put_nowait(CallerError(f"at most {_MOST_WAITING} requests may wait for their turn"))


@router.websocket("/api/v2/generate")
async def generate(socket: WebSocket) -> None:
    """See the module."""
    gateway = gateway_of(socket)
    await socket.accept()
    inbox = SocketInbox(socket)
    faults: list[Exception] = []
    try:
        with barrier("a WebSocket", faults.append):
            try:
                await _converse(socket, inbox, gateway)
            except CorollaError as error:
                faults.append(error)
        for ended in faults:
            told = ended if isinstance(ended, CorollaError) else fault(ended, debug=gateway.config.debug)
            gateway.metrics.failed(kind_of(told))
            await _say(socket, {"ok": False, "traceback": petals_text(told, debug=gateway.config.debug)})
            await socket.close(_INVALID if told.status < 500 else _FAULT)
    except WebSocketDisconnect:
        pass  # nobody is left to be told
    finally:
        inbox.close()


async def _converse(socket: WebSocket, inbox: SocketInbox, gateway: Gateway) -> None:
    """Until the client goes away. Raises `CorollaError` for what it does wrong or nobody can do."""
    caller = caller_of(socket)
    session: OpenSession | None = None
    try:
        while True:
            request = await inbox.next()
            kind = request.get("type")
            if kind == "open_inference_session" and session is None:
                opening = _parsed(Open, request)
                session = gateway.sessions.open(gateway.models.named(opening.model), caller.id, opening.max_length)
                await _say(socket, {"ok": True})
            elif kind == "generate" and session is not None:
                gateway.rates.check(caller.id, caller.rate)
                await _generate(socket, inbox, gateway, session, _parsed(SocketGenerate, request))
            else:
                raise CallerError('the first request is {"type": "open_inference_session", ...}, all others {"type": "generate", ...}')
    except WebSocketDisconnect:
        return
    finally:
        if session is not None:
            gateway.sessions.close(session)


async def _generate(socket: WebSocket, inbox: SocketInbox, gateway: Gateway, session: OpenSession, asked: SocketGenerate) -> None:
    tokenizer = session.model.tokenizer
    prompt = await tokens_of(gateway, session.model, asked.inputs, session.tokens)
    room, every = asked.room(len(prompt), session.most), session.most + 1
    stops: list[str] = []
    ends = set(session.model.stop_ids())
    if asked.stop_sequence is not None:
        every = asked.max_new_tokens or room
        room = session.most - len(prompt)
        stops = [asked.stop_sequence, *(asked.extra_stop_sequences or ())]
        if (special := tokenizer.token_id(asked.stop_sequence)) is not None:
            ends.add(special)
    elif asked.extra_stop_sequences:
        raise InvalidSetting("extra_stop_sequences", "they go with a stop_sequence")
    settings = asked.settings(room, stop_sequences=stops, stop_token_ids=tuple(sorted(ends)))
    answer = gateway.tasks.begin(
        GenerationRequest(model=session.model, owner=session.owner, prompt=prompt, settings=settings, session=session.kept)
    )
    watching = asyncio.create_task(inbox.gone.wait())
    watching.add_done_callback(lambda _: answer.stop())  # which does nothing to an answer that has ended
    try:
        text, count = await _stream(socket, answer, every)
    finally:
        watching.cancel()
        answer.stop()
        await answer.ended.wait()
    result = answer.result
    if result is None or inbox.gone.is_set():
        raise WebSocketDisconnect
    session.tokens = [*prompt, *result.token_ids]
    if asked.stop_sequence is not None and result.finish_reason is FinishReason.STOP:
        # The model has "read" how its answer ended, and the next inputs begin after that; so it is in Petals.
        if session.tokens[-1] != tokenizer.token_id(asked.stop_sequence):
            known = tokenizer.decode(result.token_ids)
            rest = result.text[len(known) :] if result.text.startswith(known) else ""
            session.tokens += tokenizer.encode(rest + asked.stop_sequence)
        text += asked.stop_sequence
    await _say(socket, {"ok": True, "outputs": text, "stop": True, "token_count": count})


async def _stream(socket: WebSocket, answer: GenerationTask, every: int) -> tuple[str, int]:
    """Send pieces of `every` tokens; returns the text and the number of tokens that are left for the last one."""
    text, count = "", 0
    async for item in answer.items(_TICK):
        if isinstance(item, CompletionDelta):
            if count >= every and text:
                await _say(socket, {"ok": True, "outputs": text, "stop": False, "token_count": count})
                text, count = "", 0
            text += item.text
            count += item.token is not None
    return text, count


def _parsed(model: type[BaseModel], request: dict[str, Any]) -> Any:
    try:
        return model.model_validate(request)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidSetting(".".join(map(str, first["loc"])) or "request", first["msg"]) from None


async def _say(socket: WebSocket, message: dict[str, Any]) -> None:
    await socket.send_text(json.dumps(message))
