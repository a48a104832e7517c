"""A conversation: its turns, as tokens that fit the context, and as a file."""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from corolla.chat.templates import Template, Turn, encode, template_named
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import CallerError, EmptyPrompt, PromptTooLong, StorageError
from corolla.models.json_files import read_json


class Conversation:
    """Questions and answers by turns, rendered by a template.

    `system` is the system prompt (the template's own by default), `few_shot` are example turns before the first question;
    both stay when old turns have to go. `context_length` counts tokens.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: Template,
        *,
        context_length: int,
        system: str | None = None,
        few_shot: Sequence[Turn] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.context_length = context_length
        self.system = template.system if system is None else system
        self.few_shot = tuple(few_shot)
        self.turns: list[Turn] = []

    def ask(self, question: str) -> None:
        """Add a question. Raises `EmptyPrompt` for one of blanks only."""
        if not question.strip():
            raise EmptyPrompt
        self.turns.append(Turn("user", question))

    def answer(self, text: str) -> None:
        """Add the answer to the last question. The blanks around it belong to a declared template's marks."""
        self.turns.append(Turn("assistant", text if self.template.own else text.strip()))

    def undo(self) -> str | None:
        """Take back the last question with its answer; returns the question, `None` if there was none."""
        while self.turns:
            turn = self.turns.pop()
            if turn.role == "user":
                return turn.content
        return None

    def retry(self) -> bool:
        """Take back the last answer, so that its question waits for another; tells whether there is such a question."""
        while self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
        return bool(self.turns)

    def reset(self) -> None:
        """Forget all turns; system prompt and examples stay."""
        self.turns.clear()

    def prompt(self, room: int) -> list[int]:
        """The tokens up to the next answer, leaving `room` tokens of the context for it.

        The oldest turns are left out, whole questions with their answers, until the rest fits; `turns` keeps them.
        Raises `PromptTooLong` if not even the last question fits.
        """
        limit = self.context_length - room

        def tokens(start: int) -> list[int]:
            return encode(self.template, self.tokenizer, self.system, [*self.few_shot, *self.turns[start:]])

        prompt = tokens(0)
        if len(prompt) > limit:
            starts = [index for index, turn in enumerate(self.turns) if turn.role == "user"]
            first = bisect_left(starts, -limit, hi=max(0, len(starts) - 1), key=lambda start: -len(tokens(start)))
            prompt = tokens(starts[first] if starts else 0)
        if len(prompt) > limit:
            raise PromptTooLong(len(prompt), limit)
        return prompt

    def save(self, path: Path) -> None:
        """Write the conversation to `path` as JSON, whole or not at all. Raises `StorageError` when the disk refuses."""
        content = {"template": self.template.name, "system": self.system, "few_shot": _plain(self.few_shot), "turns": _plain(self.turns)}
        _write_atomically(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")

    def load(self, path: Path) -> None:
        """Take template, system prompt, examples and turns from a saved conversation. Raises `CallerError` if `path` holds none."""
        content = _read(path)
        if not isinstance(content, dict) or not isinstance(content.get("system"), str) or not isinstance(content.get("template"), str):
            raise CallerError(f"{path} is no saved conversation: it needs template, system, few_shot and turns")
        template = template_named(content["template"])
        few_shot, turns = (_turns(content.get(key), path) for key in ("few_shot", "turns"))
        self.template, self.system, self.few_shot, self.turns = template, content["system"], tuple(few_shot), turns


def read_few_shot(path: Path) -> list[Turn]:
    """Example turns from a JSON list of `{"role": "user" | "assistant", "content": text}` or of `{"prompt", "completion"}`.

    Raises `CallerError` for anything else, and unless questions and answers take turns.
    """
    entries = _read(path)
    if (
        isinstance(entries, list)
        and entries
        and all(isinstance(entry, dict) and {"prompt", "completion"} <= entry.keys() for entry in entries)
    ):
        roles = (("user", "prompt"), ("assistant", "completion"))
        entries = [{"role": role, "content": entry[key]} for entry in entries for role, key in roles]
    turns = _turns(entries, path)
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise CallerError(f"{path}: examples are questions each with its answer; let the roles user and assistant take turns")
    return turns


def _plain(turns: Iterable[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _turns(entries: Any, path: Path) -> list[Turn]:
    turns = []
    for entry in entries if isinstance(entries, list) else [None]:
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if role not in ("user", "assistant") or not isinstance(content, str):
            raise CallerError(f'{path}: turns are a list of {{"role": "user" or "assistant", "content": "..."}}')
        turns.append(Turn(role, content))
    return turns


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise CallerError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CallerError(f"{path} is no JSON: {error}") from None


def _write_atomically(path: Path, text: str) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None
