"""`/v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from corolla.client.completion import CompletionDelta, CompletionResult
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import EmptyPrompt, InvalidSetting
from corolla.gateway.generation_tasks import GenerationRequest, GenerationTask
from corolla.gateway.model_registry import ServedModel
from corolla.gateway.openai import Sampling, router
from corolla.gateway.openai_answers import respond
from corolla.gateway.openai_chat import EVENTS, text_tokens
from corolla.gateway.service import Gateway, TheCaller, TheGateway
from corolla.types import FinishReason

_DEFAULT_TOKENS = 16  # OpenAI's
_MOST_PROMPTS = 64

Text = str
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=_MOST_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None
    suffix: str | None = None


@router.post("/completions", response_class=Response, responses=EVENTS)
async def completions(http: HttpRequest, asked: CompletionRequest, gateway: TheGateway, caller: TheCaller) -> Response:
    """What goes on from a text, or from each of several; a prompt may be token ids."""
    asked.refuse_unknown()
    choices = asked.n or 1
    if asked.best_of not in (None, choices):
        raise InvalidSetting("best_of", "Corolla returns all that it samples: give n alone")
    if asked.suffix:
        raise InvalidSetting("suffix", "the models here continue texts and fill no gaps: leave it out")
    most = _DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
    echo, scored = bool(asked.echo), asked.logprobs is not None
    if most == 0 and not echo:
        raise InvalidSetting("max_tokens", "0 goes with echo alone")
    if asked.stream and echo and scored:
        raise InvalidSetting("stream", "the scores of an echoed prompt come with the whole answer: leave stream out")
    model = gateway.models.named(asked.model)
    prompts = await asyncio.gather(*(_tokens(gateway, model, prompt) for prompt in _prompts(asked.prompt)))
    if len(prompts) * choices > _MOST_PROMPTS:
        raise InvalidSetting("prompt", f"{len(prompts)} prompts with {choices} answers each are more than {_MOST_PROMPTS} answers")
    soft = await gateway.soft_prompt(asked.soft_prompt, model)
    before = 0 if soft is None else len(soft)
    requests = [
        GenerationRequest(
            model=model,
            owner=caller.id,
            prompt=prompt,
            settings=asked.settings(
                choice,
                min(max(1, most), model.check_room(before + len(prompt))),
                model.stop_ids(),
                top_logprobs=asked.logprobs or 0,
                prompt_logprobs=echo and scored,
            ),
            soft=soft,
        )
        for prompt in prompts
        for choice in range(choices)
    ]
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    shape = CompletionShape(model.tokenizer, echo=echo, scored=scored, nothing=most == 0)
    return await respond(http, gateway, requests, shape, prompts=len(prompts), stream=bool(asked.stream), usage=usage)


def _prompts(prompt: Any) -> Sequence[str | list[int]]:
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


async def _tokens(gateway: Gateway, model: ServedModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        model.check_size(prompt)
        tokens = await gateway.tasks.prepare(partial(model.tokenizer.encode, prompt, opening=True))
        if not tokens:
            raise EmptyPrompt
        return tokens
    model.check_room(len(prompt))
    if max(prompt) >= model.vocabulary:
        raise InvalidSetting("prompt", f"token {max(prompt)} is outside a vocabulary of {model.vocabulary}")
    return prompt


class CompletionShape:
    """See `openai_answers.Shape`. `nothing` is asked for beside the `echo`."""

    prefix = "cmpl"
    object = "text_completion"
    chunk = "text_completion"

    def __init__(self, tokenizer: TextTokenizer, *, echo: bool, scored: bool, nothing: bool) -> None:
        self._tokenizer, self._echo, self._scored, self._nothing = tokenizer, echo, scored, nothing
        self._offsets: dict[int, int] = {}

    def whole(self, index: int, answer: GenerationTask, result: CompletionResult) -> dict[str, Any]:
        assert result.finish_reason is not None
        text = "" if self._nothing else result.text
        count = 0 if self._nothing else text_tokens(answer, result)
        scores = list(zip(result.token_ids[:count], result.logprobs[:count], result.top_logprobs[:count], strict=True))
        if self._echo:
            prompt = answer.request.prompt
            text = self._tokenizer.decode(prompt) + text
            if self._scored:
                first = 0 if answer.request.soft is None else len(answer.request.soft)
                found = [answer.scores[at] if at else None for at in range(first, first + len(prompt))]
                given = [
                    (token_id, *((None, ()) if score is None else (score.logprob, score.top_logprobs)))
                    for token_id, score in zip(prompt, found, strict=True)
                ]
                scores = [*given, *scores]
        logprobs = self._logprobs(scores, 0) if self._scored else None
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._nothing else result.finish_reason.value,
        }

    def opening(self, index: int, answer: GenerationTask) -> dict[str, Any] | None:
        if not self._echo:
            return None
        return self._chunk(index, self._tokenizer.decode(answer.request.prompt))

    def piece(self, index: int, answer: GenerationTask, piece: CompletionDelta) -> dict[str, Any] | None:
        if self._nothing:
            return None
        logprobs = None
        if self._scored and piece.token is not None and piece.token.finish is not FinishReason.STOP:
            token = piece.token
            logprobs = self._logprobs([(token.token_id, token.logprob, token.top_logprobs)], self._offsets.get(index, 0))
        self._offsets[index] = self._offsets.get(index, 0) + len(piece.text)
        return self._chunk(index, piece.text, logprobs) if piece.text or logprobs else None

    def ending(self, index: int, finish: str) -> dict[str, Any]:
        return self._chunk(index, "", None, "length" if self._nothing else finish)

    @staticmethod
    def _chunk(index: int, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, scores: Sequence[tuple[int, float | None, Sequence[tuple[int, float]]]], offset: int) -> dict[str, Any]:
        tokens, offsets, tops = [], [], []
        for token_id, logprob, top in scores:
            text = self._tokenizer.spelling(token_id)
            tokens.append(text)
            offsets.append(offset)
            offset += len(text)
            tops.append(None if logprob is None else {self._tokenizer.spelling(each): score for each, score in reversed(top)})
        return {"tokens": tokens, "token_logprobs": [logprob for _, logprob, _ in scores], "top_logprobs": tops, "text_offset": offsets}
