"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from corolla.chat.templates import Turn, encode
from corolla.client.completion import CompletionDelta, CompletionResult
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import EmptyPrompt, InvalidSetting
from corolla.gateway.generation_tasks import GenerationRequest, GenerationTask
from corolla.gateway.openai import Sampling, router
from corolla.gateway.openai_answers import respond
from corolla.gateway.service import TheCaller, TheGateway
from corolla.types import FinishReason

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answers, or their events.", "content": {"application/json": {}, "text/event-stream": {}}}
}


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: str = "text"


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    template: str | None = Field(None, description="Beside OpenAI's options: a template of this gateway in place of the model's own.")
    tools: list[dict[str, Any]] | None = None
    response_format: ResponseFormat | None = None


@router.post("/chat/completions", response_class=Response, responses=EVENTS)
async def chat_completions(http: HttpRequest, asked: ChatRequest, gateway: TheGateway, caller: TheCaller) -> Response:
    """The next message of a conversation."""
    asked.refuse_unknown()
    if asked.tools:
        raise InvalidSetting("tools", "the models here call none: leave it out")
    if asked.response_format is not None and asked.response_format.type != "text":
        raise InvalidSetting("response_format", "answers are text: leave it out")
    if asked.top_logprobs and not asked.logprobs:
        raise InvalidSetting("top_logprobs", "it goes with logprobs: true")
    model = gateway.models.named(asked.model)
    model.check_size(*(message.text for message in asked.messages))
    template = model.template_or_default(asked.template)
    instructions = [message.text for message in asked.messages if message.role in ("system", "developer")]
    system = "\n\n".join(instructions) if instructions else template.system
    turns = [
        Turn("user" if message.role == "user" else "assistant", message.text)
        for message in asked.messages
        if message.role in ("user", "assistant")
    ]
    if not turns:
        raise EmptyPrompt
    prompt = await gateway.tasks.prepare(partial(encode, template, model.tokenizer, system, turns))
    soft = await gateway.soft_prompt(asked.soft_prompt, model)
    room = model.check_room(len(prompt) + (0 if soft is None else len(soft)))
    most = min(asked.max_completion_tokens or asked.max_tokens or room, room)
    requests = [
        GenerationRequest(
            model=model,
            owner=caller.id,
            prompt=prompt,
            settings=asked.settings(choice, most, model.stop_ids(template), template.stop_sequences, top_logprobs=asked.top_logprobs or 0),
            soft=soft,
        )
        for choice in range(asked.n or 1)
    ]
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    shape = ChatShape(model.tokenizer, strip=not template.own, logprobs=bool(asked.logprobs))
    return await respond(http, gateway, requests, shape, prompts=1, stream=bool(asked.stream), usage=usage)


class ChatShape:
    """See `openai_answers.Shape`. `strip` drops the blanks before an answer that belong to a template's marks."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, tokenizer: TextTokenizer, *, strip: bool, logprobs: bool) -> None:
        self._tokenizer, self._strip, self._logprobs = tokenizer, strip, logprobs
        self._said: set[int] = set()

    def whole(self, index: int, answer: GenerationTask, result: CompletionResult) -> dict[str, Any]:
        text = result.text.lstrip() if self._strip else result.text
        logprobs = None
        if self._logprobs:
            count = text_tokens(answer, result)
            entries = zip(result.token_ids[:count], result.logprobs, result.top_logprobs, strict=False)
            logprobs = {"content": [self._entry(*entry) for entry in entries], "refusal": None}
        assert result.finish_reason is not None
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": result.finish_reason.value}

    def opening(self, index: int, answer: GenerationTask) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, answer: GenerationTask, piece: CompletionDelta) -> dict[str, Any] | None:
        text = piece.text
        if self._strip and index not in self._said:
            text = text.lstrip()
        if text:
            self._said.add(index)
        entries = []
        if self._logprobs and piece.token is not None and piece.token.finish is not FinishReason.STOP:
            entries = [self._entry(piece.token.token_id, piece.token.logprob, piece.token.top_logprobs)]
        if not text and not entries:
            return None
        return self._chunk(index, {"content": text}, {"content": entries, "refusal": None} if self._logprobs else None)

    def ending(self, index: int, finish: str) -> dict[str, Any]:
        return self._chunk(index, {}, None, finish)

    @staticmethod
    def _chunk(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _entry(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        return {**self._token(token_id, logprob), "top_logprobs": [self._token(*each) for each in top]}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.spelling(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def text_tokens(answer: GenerationTask, result: CompletionResult) -> int:
    """How many of the result's tokens are text: all but an end token."""
    ended = bool(result.token_ids) and result.token_ids[-1] in answer.request.settings.stop_token_ids
    return len(result.token_ids) - ended
