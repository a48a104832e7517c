"""Several answers to one request of OpenAI's interface, whole or side by side as events; the shape of a choice is the caller's."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from corolla.barrier import barrier
from corolla.client.completion import CompletionDelta, CompletionResult
from corolla.errors import CorollaError, Interrupted
from corolla.gateway.error_responses import openai_shown
from corolla.gateway.generation_tasks import GenerationRequest, GenerationTask
from corolla.gateway.service import Gateway, unless_gone
from corolla.gateway.sse import KEEP_ALIVE, EventStream, data

DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """How answers look in one of the two interfaces."""

    prefix: str  # of ids
    object: str
    chunk: str  # the object's name in a stream

    def whole(self, index: int, answer: GenerationTask, result: CompletionResult) -> dict[str, Any]:
        """A finished choice."""
        ...

    def opening(self, index: int, answer: GenerationTask) -> dict[str, Any] | None:
        """What a choice's stream begins with, if anything."""
        ...

    def piece(self, index: int, answer: GenerationTask, piece: CompletionDelta) -> dict[str, Any] | None:
        """What a piece adds, if anything."""
        ...

    def ending(self, index: int, finish: str) -> dict[str, Any]:
        """What a choice's stream ends with."""
        ...


async def respond(
    http: HttpRequest, gateway: Gateway, requests: Sequence[GenerationRequest], shape: Shape, *, prompts: int, stream: bool, usage: bool
) -> Response:
    """Answers to all of the requests, in order; `prompts` of them differ in their prompt."""
    answers: list[GenerationTask] = []
    try:
        for request in requests:
            answers.append(gateway.tasks.begin(request))
        head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "object": shape.chunk if stream else shape.object,
            "created": int(time.time()),
            "model": requests[0].model.name,
        }
        if stream:
            await unless_gone(http, answers[0].begun(gateway.config.first_token), *answers)
            return EventStream(_events(gateway, answers, shape, head, prompts if usage else None))
        results = await unless_gone(http, asyncio.gather(*(answer.whole() for answer in answers)), *answers)
    except BaseException:
        for answer in answers:
            answer.stop()
        raise
    choices = [shape.whole(index, answer, result) for index, (answer, result) in enumerate(zip(answers, results, strict=True))]
    return JSONResponse({**head, "choices": choices, "usage": _usage(results, prompts)})


async def _events(
    gateway: Gateway, answers: Sequence[GenerationTask], shape: Shape, head: dict[str, Any], prompts: int | None
) -> AsyncIterator[bytes]:
    """One answer's events as they come; several answers' events, each answer's in order."""

    def chunk(choice: dict[str, Any]) -> bytes:
        return data({**head, "choices": [choice], **({"usage": None} if prompts is not None else {})})

    async def choice(index: int, answer: GenerationTask) -> AsyncIterator[bytes]:
        if (opening := shape.opening(index, answer)) is not None:
            yield chunk(opening)
        async for item in answer.items(gateway.config.keep_alive):
            if item is None:
                yield KEEP_ALIVE
            elif isinstance(item, CompletionDelta) and (piece := shape.piece(index, answer, item)) is not None:
                yield chunk(piece)
        await answer.ended.wait()
        if answer.result is None or answer.result.finish_reason is None:
            raise Interrupted  # the gateway ends
        yield chunk(shape.ending(index, answer.result.finish_reason.value))

    try:
        if len(answers) == 1:
            async for each in choice(0, answers[0]):
                yield each
        else:
            async for each in merged([choice(index, answer) for index, answer in enumerate(answers)]):
                yield each
        if prompts is not None:
            results = [answer.result for answer in answers if answer.result is not None]
            yield data({**head, "choices": [], "usage": _usage(results, prompts)})
    except CorollaError as error:
        gateway.metrics.failed(type(error).__name__)
        yield data({"error": openai_shown(error)})
    finally:
        for answer in answers:
            answer.stop()
    yield DONE


async def merged(streams: Sequence[AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
    """Everything from all of them, as it comes. Raises what one of them raises."""
    queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(2 * len(streams))

    async def pump(stream: AsyncIterator[bytes]) -> None:
        faults: list[Exception] = []
        with barrier("a choice's stream", faults.append):
            try:
                async for each in stream:
                    await queue.put(each)
            except CorollaError as error:
                faults.append(error)
        for fault in faults:
            await queue.put(fault if isinstance(fault, CorollaError) else CorollaError("a fault of the gateway; its log says more"))
        await queue.put(None)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(streams)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _usage(results: Sequence[CompletionResult], prompts: int) -> dict[str, Any]:
    each = max(1, len(results) // max(1, prompts))
    prompt = sum(result.prompt_tokens for result in results[::each])
    completion = sum(len(result.token_ids) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in results[::each])},
    }
