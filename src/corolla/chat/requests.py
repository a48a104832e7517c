"""A batch's request as tokens: continued as it stands, or asked as a question with a template and examples before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corolla.chat.templates import Template, Turn, encode, stop_ids
from corolla.client.batch_requests import BatchRequest
from corolla.client.tokenizer import TextTokenizer
from corolla.types import GenerationSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How the requests of one job become tokens and settings.

    `questions` asks bare prompts as questions too, with `few_shot` turns before each; without it they are continued as they stand.
    `system` is the prompt of requests that bring none. `defaults` are settings by their own names, for what a request leaves open;
    requests without a seed draw by the default one plus their index, so that no two of them draw alike.
    """

    tokenizer: TextTokenizer
    template: Template
    questions: bool = False
    system: str | None = None
    few_shot: Sequence[Turn] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, request: BatchRequest) -> tuple[list[int], GenerationSettings]:
        """Raises `InvalidSetting` for settings outside their ranges, and `CallerError` when the template refuses the messages."""
        options = {**self.defaults, **request.settings}
        if "seed" not in request.settings:
            options["seed"] = (self.defaults.get("seed") or 0) + request.index
        messages = (("user", request.prompt),) if self.questions and request.prompt is not None else request.messages
        stops: tuple[str, ...] = ()
        if not messages:
            assert request.prompt is not None, "a request without an error has a prompt or messages"
            tokens, ends = self.tokenizer.encode(request.prompt, opening=True), self.tokenizer.end_ids
        else:
            tokens = encode(self.template, self.tokenizer, self._system(messages), [*self.few_shot, *_turns(messages)])
            stops, ends = self.template.stop_sequences, stop_ids(self.template, self.tokenizer)
        settings = GenerationSettings.parse(**options)
        return tokens, GenerationSettings.parse(
            **options | {"stop_sequences": (*stops, *settings.stop_sequences), "stop_token_ids": (*ends, *settings.stop_token_ids)}
        )

    def _system(self, messages: Sequence[tuple[str, str]]) -> str:
        if messages[0][0] == "system":
            return messages[0][1]
        return self.template.system if self.system is None else self.system


def _turns(messages: Sequence[tuple[str, str]]) -> list[Turn]:
    return [Turn(role, content) for role, content in messages if role in ("user", "assistant")]  # type: ignore[arg-type]
