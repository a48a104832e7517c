"""Requests of a batch, from JSON and JSONL files.

A request is a string, `{"prompt": text}`, `{"messages": [{"role", "content"}, ...]}`, or a line of OpenAI's batch files
(`{"custom_id", "url", "body": {...}}`). Beside its text it may have an `id`, `metadata` (anything, copied to the result),
`logprobs`, and generation settings by any of their names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corolla.errors import CallerError, DataError, EmptyPrompt, InvalidSetting
from corolla.types import GenerationSettings, setting_name

SUFFIXES = (".json", ".jsonl", ".ndjson")
_LINES = (".jsonl", ".ndjson")
_ROLES = ("system", "user", "assistant")
_LISTS = ("requests", "prompts")  # the keys under which a JSON document may keep its list
_OF_NO_EFFECT = frozenset({"model", "user", "stream", "store", "n", "frequency_penalty", "presence_penalty"})  # in OpenAI's bodies
_NEUTRAL = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0}


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request: a `prompt` to continue, or `messages` (role, content) to answer, or the `error` that it is.

    `index` counts the requests of the whole input, `settings` are as `GenerationSettings.parse` takes them, by their own names.
    """

    index: int
    id: str
    prompt: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    logprobs: bool | None = None
    metadata: Any = None
    error: CallerError | None = None


def input_files(source: Path) -> list[Path]:
    """The files to read: `source` itself, or those of a directory that end in `SUFFIXES`, in the order of their paths.

    Raises `DataError` when there are none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source} does not exist: name a JSON or JSONL file, or a directory of them")
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{source} has no files that end in {', '.join(SUFFIXES)}")
    return files


def read_requests(source: Path) -> Iterator[BatchRequest]:
    """The requests of all files in order. What cannot be understood is a request with an `error` that names its file and line.

    Raises `DataError` for a file that cannot be read at all.
    """
    index = 0
    for file in input_files(source):
        for number, value, problem in _values(file):
            place = f"{file.name}:{number}"
            if problem is not None:
                yield BatchRequest(index, place, error=DataError(f"{file}, {'line' if _in_lines(file) else 'request'} {number}: {problem}"))
            else:
                yield _request(index, place, value)
            index += 1


def digests(source: Path) -> dict[str, str]:
    """The SHA-256 of each input file, by its path below `source`. Raises `DataError` like `read_requests`."""
    root = source if source.is_dir() else source.parent
    found = {}
    for path in input_files(source):
        try:
            with path.open("rb") as file:
                found[path.relative_to(root).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return found


def _in_lines(file: Path) -> bool:
    return file.suffix.lower() in _LINES


def _values(file: Path) -> Iterator[tuple[int, Any, str | None]]:
    """(line or place in the list, counted from 1; value; what is wrong with it)."""
    try:
        if _in_lines(file):
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, *_parsed(line)
            return
        value, problem = _parsed(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    if isinstance(value, dict):
        value = next((value[key] for key in _LISTS if isinstance(value.get(key), list)), value)
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        yield number, item, problem


def _parsed(text: bytes) -> tuple[Any, str | None]:
    try:
        return json.loads(text.decode("utf-8-sig")), None
    except UnicodeDecodeError:
        return None, "it is no UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"it is no JSON ({error})"


def _request(index: int, place: str, value: Any) -> BatchRequest:
    """The request, or the same with an error in place of everything else; its own id is kept where it has one."""
    name = place
    try:
        if isinstance(value, str):
            return BatchRequest(index, place, prompt=_not_empty(value))
        if not isinstance(value, dict):
            raise DataError(f"{place} is neither a text nor an object")
        given = value.get("custom_id", value.get("id"))
        name = place if given is None else str(given)
        return _from_object(index, name, value)
    except CallerError as error:
        return BatchRequest(index, name, error=error)


def _from_object(index: int, name: str, value: dict[str, Any]) -> BatchRequest:
    fields = {key: item for key, item in value.items() if key not in ("id", "custom_id", "method", "url")}
    metadata = fields.pop("metadata", None)
    if isinstance(fields.get("body"), dict):
        metadata = fields["body"].get("metadata", metadata)
        fields = {key: item for key, item in fields["body"].items() if key != "metadata" and not _without_effect(key, item)}
    prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    logprobs = fields.pop("logprobs", None)
    if isinstance(logprobs, int) and not isinstance(logprobs, bool):  # the way of OpenAI's completions
        fields.setdefault("top_logprobs", logprobs)
        logprobs = True
    if (prompt is None) == (messages is None):
        raise DataError("a request has either a prompt or messages")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError("a prompt is one text; put several into requests of their own")
    settings = {setting_name(key): item for key, item in fields.items()}
    GenerationSettings.parse(**settings)
    return BatchRequest(
        index,
        name,
        prompt=None if prompt is None else _not_empty(prompt),
        messages=() if messages is None else _messages(messages),
        settings=settings,
        logprobs=True if settings.get("top_logprobs") else logprobs,
        metadata=metadata,
    )


def _without_effect(key: str, value: Any) -> bool:
    if key not in _OF_NO_EFFECT:
        return False
    if value is not None and key in _NEUTRAL and value != _NEUTRAL[key]:
        raise InvalidSetting(key, f"{value!r} is not supported in a batch, only {_NEUTRAL[key]}")
    return True


def _messages(messages: Any) -> tuple[tuple[str, str], ...]:
    found = []
    for message in messages if isinstance(messages, list) else [None]:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in _ROLES or not isinstance(content, str):
            raise DataError('messages are a list of {"role": "system", "user" or "assistant", "content": "..."}')
        found.append((role, content))
    if not found or found[-1][0] != "user" or any(role == "system" for role, _ in found[1:]):
        raise DataError("messages end with the user's, and a system prompt comes first")
    _not_empty(found[-1][1])
    return tuple(found)


def _not_empty(text: str) -> str:
    if not text.strip():
        raise EmptyPrompt
    return text
