"""A conversation that is answered: turns in, a stream of text out, the answer a turn again."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from typing import Any

from corolla.chat.conversation import Conversation
from corolla.chat.templates import stop_ids
from corolla.client.completion import Completion, CompletionDelta, CompletionResult
from corolla.client.session import Session
from corolla.types import GenerationSettings


class Dialogue:
    """`conversation` answered through `session`.

    `options` are generation settings as `GenerationSettings.parse` takes them; without a `seed` every answer draws its own.
    `result` is that of the last answer. `timeout` is the longest wait for one token, in seconds.
    Raises `InvalidSetting` for options outside their ranges.
    """

    def __init__(self, conversation: Conversation, session: Session, options: dict[str, Any], *, timeout: float = 60.0) -> None:
        self.conversation = conversation
        self.session = session
        self.timeout = timeout
        self.result: CompletionResult | None = None
        self._retries = 0
        self._options: dict[str, Any] = {}
        self.set(**options)

    @property
    def options(self) -> dict[str, Any]:
        """The options as they stand."""
        return dict(self._options)

    def set(self, **options: Any) -> None:
        """Change options. Raises `InvalidSetting`, and then changes nothing."""
        changed = {**self._options, **options}
        GenerationSettings.parse(**changed)
        self._options = changed

    def ask(self, question: str) -> Generator[CompletionDelta, None, None]:
        """Stream the answer to `question`; both become turns.

        An answer that is interrupted (the iterator closed, an exception) is kept as far as it came; if nothing came, the
        question is taken back too. Raises `EmptyPrompt`, `PromptTooLong` and what `Session.generate` raises.
        """
        self.conversation.ask(question)
        self._retries = 0
        return self._answer()

    def retry(self) -> Generator[CompletionDelta, None, None] | None:
        """Stream another answer to the last question; `None` if there is no question. A fixed seed moves on by one."""
        if not self.conversation.retry():
            return None
        self._retries += 1
        return self._answer()

    def _answer(self) -> Generator[CompletionDelta, None, None]:
        self.result = None
        completion = None
        try:
            settings = self._settings()
            room = min(settings.max_tokens_to_generate, self.conversation.context_length // 2)
            completion = Completion(
                self.session, self.conversation.tokenizer, self.conversation.prompt(room), settings, timeout=self.timeout
            )
            yield from completion
        finally:
            if completion is not None:
                completion.close()
                self.result = completion.result
            if self.result is not None and (self.result.text or self.result.finish_reason):
                self.conversation.answer(self.result.text)
            else:
                self.conversation.undo()

    def _settings(self) -> GenerationSettings:
        template = self.conversation.template
        options = self.options
        stops = options.pop("stop_sequences", None) or options.pop("stop", None) or ()
        seed = options.pop("seed", None)
        ends = options.pop("stop_token_ids", None) or ()
        return GenerationSettings.parse(
            **options,
            seed=secrets.randbelow(2**31) if seed is None else seed + self._retries,
            stop_sequences=(*template.stop_sequences, *((stops,) if isinstance(stops, str) else stops)),
            stop_token_ids=(*stop_ids(template, self.conversation.tokenizer), *ends),
        )
