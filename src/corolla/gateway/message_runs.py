"""Answers in conversations: written whether or not a page looks on, and kept as they come."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from corolla.barrier import barrier
from corolla.chat.conversation import Conversation
from corolla.chat.templates import Template
from corolla.client.completion import CompletionDelta, CompletionResult
from corolla.errors import CorollaError
from corolla.gateway.conversations import turns
from corolla.gateway.error_responses import kind_of
from corolla.gateway.generation_tasks import GenerationRequest, GenerationTask, Notice
from corolla.gateway.keeping import EVERY, lasting
from corolla.gateway.model_registry import ServedModel
from corolla.gateway.service import Gateway
from corolla.gateway.sse import KEEP_ALIVE, event
from corolla.types import GenerationSettings

CHAT_DEFAULTS: Mapping[str, Any] = {"max_tokens_to_generate": 512, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
_TICK = 1.0
_NOT_SAVED = (  # seconds, and what is then told
    (3.0, Notice("The answer is not saved yet: the database does not answer.")),
    (12.0, Notice("The answer could not be saved: copy what you need of it. It is still tried.")),
)


class Stats:
    """How quickly an answer comes, counted in tokens since it `began` (on `time.perf_counter`'s clock)."""

    def __init__(self, began: float) -> None:
        self.tokens = 0
        self._began = began
        self._first = self._latest = 0.0

    def count(self) -> None:
        """A token has come."""
        self._latest = time.perf_counter()
        self._first = self._first or self._latest
        self.tokens += 1

    def shown(self, result: CompletionResult | None) -> dict[str, Any]:
        """As in a message; `result` is known when the answer has ended."""
        seconds = self._latest - self._first
        return {
            "ttft": self._first - self._began if self.tokens else None,
            "tokens": self.tokens,
            "tokens_per_second": (self.tokens - 1) / seconds if seconds > 0 else None,
            "prompt_tokens": None if result is None else result.prompt_tokens,
            "cached_tokens": None if result is None else result.cached_tokens,
        }


class MessageRun:
    """One answer of a conversation while it is being written; `watch` tells how it gets on, from its beginning."""

    def __init__(self, message: Mapping[str, Any], answer: GenerationTask) -> None:
        self.message: dict[str, Any] = {**message, "notices": list(message["notices"])}
        self.answer = answer
        self.stopped = False  # by its reader
        self._before = str(message["text"])  # of an answer that goes on
        self._pieces: list[str] = []
        self._stats = Stats(answer.began)
        self._changed = asyncio.Event()
        self._over = False

    @property
    def text(self) -> str:
        return self._before + "".join(self._pieces)

    @property
    def stats(self) -> dict[str, Any]:
        """As in a message."""
        return self._stats.shown(self.answer.result)

    async def write(self, gateway: Gateway) -> None:
        """Until the answer ends, whatever ends it."""
        faults: list[Exception] = []
        with barrier("an answer of a conversation", faults.append):
            await self._write(gateway)
        if faults:
            self.answer.stop()
            await self._end(gateway, "failed", None, CorollaError("a fault of the gateway; its log says more"))

    async def _write(self, gateway: Gateway) -> None:
        saved = time.monotonic()
        error: CorollaError | None = None
        try:
            async for item in self.answer.items(_TICK):
                self._take(item)
                if time.monotonic() - saved > EVERY:
                    saved = time.monotonic()
                    gateway.keeper.put(self.message["id"], {"text": self.text, "stats": self.stats, "notices": self.message["notices"]})
        except CorollaError as raised:
            error = raised
            gateway.metrics.failed(kind_of(raised))
        await self.answer.ended.wait()
        result = self.answer.result
        finish = None if result is None or result.finish_reason is None else result.finish_reason.value
        state = "failed" if error is not None else "done" if finish else "stopped" if self.stopped else "interrupted"
        await self._end(gateway, state, finish, error)

    async def _end(self, gateway: Gateway, state: str, finish: str | None, error: CorollaError | None) -> None:
        ending = {
            "text": self.text,
            "state": state,
            "finish": finish,
            "stats": self.stats,
            "error": None if error is None else lasting(error),
            "notices": self.message["notices"],
        }
        saving = gateway.keeper.end(self.message["id"], ending)
        for patience, notice in _NOT_SAVED:
            if not (await asyncio.wait([saving], timeout=patience))[0]:
                self._take(notice)
        self.message |= {**ending, "notices": self.message["notices"]}
        self._over = True
        self._tell()

    async def watch(self, keep_alive: float, closing: asyncio.Event) -> AsyncIterator[bytes]:
        """Events as docs/api.md has them."""
        pieces, notices = len(self._pieces), len(self.message["notices"])
        yield event("snapshot", {"text": self.text, "tokens": self._stats.tokens, "state": self.message["state"]})
        if self.answer.queued is None and not self._over:
            yield event("waiting", {"position": self.answer.place})
        while True:
            changed = self._changed
            if len(self._pieces) > pieces:
                text = "".join(self._pieces[pieces:])
                pieces = len(self._pieces)
                if text:
                    stats = self.stats
                    yield event("delta", {"text": text, **{name: stats[name] for name in ("tokens", "tokens_per_second", "ttft")}})
            for notice in self.message["notices"][notices:]:
                notices += 1
                yield event("notice", {"text": notice})
            if self._over:
                yield event("done", {"message": self.message})
                return
            if changed is not self._changed:
                continue
            try:
                await asyncio.wait_for(changed.wait(), keep_alive)
            except TimeoutError:
                if closing.is_set():
                    return
                yield KEEP_ALIVE

    def _take(self, item: CompletionDelta | Notice | None) -> None:
        if isinstance(item, CompletionDelta):
            if item.token is not None:
                self._stats.count()
            self._pieces.append(item.text)
        elif isinstance(item, Notice):
            self.message["notices"].append(item.text)
        else:
            return
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class MessageRuns:
    """The answers of conversations that are being written, by their message."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._by_message: dict[str, MessageRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, message: str) -> MessageRun | None:
        """The answer if it is being written."""
        return self._by_message.get(message)

    def check(self, owner: str) -> None:
        """Raises `Busy` where no answer could begin now: before a message for it is made."""
        self._gateway.queue.check(owner)

    async def begin(self, owner: str, conversation: str, message: Mapping[str, Any]) -> None:
        """Write an answer, whose message stands already. What prevents it ends up in the message."""
        try:
            request = await self._request(owner, conversation, message)
            answer = self._gateway.tasks.begin(request)
        except CorollaError as error:
            self._gateway.keeper.end(message["id"], {"state": "failed", "error": lasting(error)})
            raise
        run = self._by_message[message["id"]] = MessageRun(message, answer)
        task = asyncio.create_task(run.write(self._gateway))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._by_message.pop(message["id"], None))

    def stop(self, message: str) -> None:
        """End an answer where it is."""
        if (run := self._by_message.get(message)) is not None:
            run.stopped = True
            run.answer.stop()

    async def settle(self) -> None:
        """Wait until the last of them is kept."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _request(self, owner: str, conversation: str, message: Mapping[str, Any]) -> GenerationRequest:
        known, path = await self._gateway.conversations.branch(owner, conversation, message["id"])
        model = self._gateway.models.named(known["model"])
        template = model.template_or_default(known["template"])
        settings = chat_settings(known["settings"], template, model)
        soft = await self._gateway.soft_prompt(known["prompt"], model)
        said = _recent(turns(path), model.most_characters)
        model.check_size(known["system"] or "", *(text for _, text in said[-1:]))
        make = partial(
            prompt_of,
            model,
            template,
            known["system"],
            said,
            settings.max_tokens_to_generate,
            message["text"],
            0 if soft is None else len(soft),
        )
        prompt = await self._gateway.tasks.prepare(make)
        return GenerationRequest(model=model, owner=owner, prompt=prompt, settings=settings, keep=True, soft=soft)


def _recent(said: Sequence[tuple[str, str]], characters: int) -> Sequence[tuple[str, str]]:
    """The last of them, from a question on: what is before so many characters has no room in any prompt."""
    first = len(said) - 1
    for index in range(len(said) - 1, -1, -1):
        characters -= len(said[index][1])
        if characters < 0:
            break
        if said[index][0] == "user":
            first = index
    return said[max(0, first) :]


def chat_settings(given: Mapping[str, Any], template: Template, model: ServedModel) -> GenerationSettings:
    """A conversation's settings. Raises `InvalidSetting`."""
    options = {**CHAT_DEFAULTS, **given}
    stops = options.pop("stop_sequences", None) or ()
    if options.get("seed") is None:
        options["seed"] = secrets.randbelow(2**31)
    return GenerationSettings.parse(
        **{**options, "stop_sequences": (*template.stop_sequences, *((stops,) if isinstance(stops, str) else stops))},
        stop_token_ids=model.stop_ids(template),
    )


def prompt_of(
    model: ServedModel, template: Template, system: str | None, said: Sequence[tuple[str, str]], room: int, begun: str, soft: int
) -> list[int]:
    """The tokens up to the answer that begins with `begun`, beside `soft` ones; the oldest turns are left out where the context is full."""
    conversation = Conversation(model.tokenizer, template, context_length=model.context_length - soft, system=system)
    for role, text in said:
        if role == "user":
            conversation.ask(text)
        else:
            conversation.answer(text)
    tokens = model.tokenizer.encode_plain(begun) if begun else []
    return conversation.prompt(min(room, conversation.context_length // 2) + len(tokens)) + tokens


def _runs(connection: HTTPConnection) -> MessageRuns:
    runs: MessageRuns = connection.app.state.message_runs
    return runs


TheRuns = Annotated[MessageRuns, Depends(_runs)]
