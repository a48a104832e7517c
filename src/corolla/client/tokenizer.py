"""A model's tokenizer and what its files say about texts, without torch or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from corolla.errors import CallerError, CheckpointError
from corolla.models.json_files import read_json

_IDS = range(2**32)  # that the library takes


class TextTokenizer:
    """Text to token ids and back, by the files of a model's directory.

    Reads tokenizer.json, and if there are any tokenizer_config.json, chat_template.jinja, config.json and
    generation_config.json. Raises `CheckpointError` when tokenizer.json is missing or one of them is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tokenizer = self._load()
        self._options = _read_json(directory / "tokenizer_config.json")
        self._config = _read_json(directory / "config.json")
        self._generation = _read_json(directory / "generation_config.json")

    @property
    def model_type(self) -> str:
        """The family as config.json names it; empty when it does not."""
        return str(self._config.get("model_type", ""))

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens (`bos_token`, `eos_token`, ...) as chat templates want them."""
        named = {}
        for name, value in self._options.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                named[name] = text
        return named

    @cached_property
    def chat_template(self) -> str | None:
        """The model's own template in Jinja's language, if it has one."""
        file = self.directory / "chat_template.jinja"
        if file.exists():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{file} is damaged ({error}): fetch the model again") from None
        template = self._options.get("chat_template")
        if isinstance(template, list):  # several by name
            template = next(
                (entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"), None
            )
        return template if isinstance(template, str) else None

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """Text that ends an answer in the model's own template, as `corolla finetune` writes it beside the template."""
        named = self._options.get("stop_sequences")
        return tuple(stop for stop in named if isinstance(stop, str) and stop) if isinstance(named, list) else ()

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, ascending."""
        ids: set[int] = set()
        declared = self._generation.get("eos_token_id", self._config.get("eos_token_id"))
        named = declared if isinstance(declared, list) else [] if declared is None else [declared]
        if not all(type(token_id) is int and token_id >= 0 for token_id in named):
            raise CheckpointError(f"{self.directory}: eos_token_id is {declared!r} and has to be a token's id, or a list of them")
        ids.update(named)
        if (end := self.special_tokens.get("eos_token")) is not None and (token_id := self.token_id(end)) is not None:
            ids.add(token_id)
        return tuple(sorted(ids))

    @cached_property
    def opening_ids(self) -> list[int]:
        """What the tokenizer puts before every text (a beginning-of-text token, in some families)."""
        ids = self._tokenizer.encode("").ids
        ends = self.end_ids
        return [token_id for token_id in ids if token_id not in ends]

    def token_id(self, token: str) -> int | None:
        """The id of a token written out, `None` if the vocabulary has no such token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, opening: bool = False) -> list[int]:
        """The tokens of `text`; special tokens written out in it are recognized. `opening` adds what every text begins with.

        Raises `CallerError` for what is no Unicode text (half of a surrogate pair).
        """
        return _encode(self._tokenizer, text, opening)

    def encode_plain(self, text: str) -> list[int]:
        """The tokens of `text` as mere text: a special token written out in it is spelled like any other word."""
        return _encode(self._plain, text, False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`; special tokens and ids outside the vocabulary have none, incomplete characters are U+FFFD."""
        return self._tokenizer.decode([token for token in token_ids if token in _IDS], skip_special_tokens=True)

    def spelling(self, token_id: int) -> str:
        """One token as text; a special one as it is written out, one outside the vocabulary as nothing."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False) if token_id in _IDS else ""

    @cached_property
    def _plain(self) -> Tokenizer:
        # A second one, because the switch is a state of the whole tokenizer and threads may share it.
        tokenizer = self._load()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _load(self) -> Tokenizer:
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{self.directory} has no tokenizer.json: save the model's fast tokenizer there")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 (the library raises no narrower type)
            raise CheckpointError(f"{file} is damaged ({error}): fetch the model again") from None
        tokenizer.no_truncation()  # which some files ask for, for the model that they were trained with
        tokenizer.no_padding()
        return tokenizer


def _encode(tokenizer: Tokenizer, text: str, opening: bool) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=opening).ids
    except (UnicodeEncodeError, TypeError):
        raise CallerError("the text is not valid Unicode: check its encoding") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): fetch the model again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged (no JSON object): fetch the model again")
    return content
