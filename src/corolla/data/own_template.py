"""A model's own chat template, compiled once for many dialogues."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2

from corolla.chat.templates import Turn, _environment
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import CallerError, CheckpointError


class OwnTemplate:
    """The template in the tokenizer's directory. Raises `CheckpointError` when it is missing or damaged."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        if tokenizer.chat_template is None:
            raise CheckpointError(f"{tokenizer.directory} has no chat template: choose one with --template")
        try:
            self._compiled = _environment().from_string(tokenizer.chat_template)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template in {tokenizer.directory} is damaged ({error}): choose one with --template") from None
        self._special_tokens = tokenizer.special_tokens

    def text(self, system: str, turns: Sequence[Turn]) -> str:
        """What `chat.templates.encode` gives to the tokenizer. Raises `CallerError` when the template refuses the turns."""
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except jinja2.TemplateError as error:
            raise CallerError(f"the model's chat template refuses this dialogue ({error}): choose another with --template") from None
