"""The tokens of plain English fast: a tokenizer that first cuts a text into words is asked for each word once.

How a text is cut is a pattern of the tokenizer's. In texts of ASCII, where a letter is a letter in every version of Unicode, Python's
patterns cut alike; a test holds that, and that the tokens are the tokenizer's own. Other texts, and other tokenizers, are left to the
library.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

_MOST = 100_000  # words that are remembered, about 20 MB
_LONGEST = 32  # characters of a word that is

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
_DIGITS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+|[0-9]"  # digits are cut out before
_BLOOM = r" ?[^(\s|.,!?)]+|(?:(?! ?[^(\s|.,!?)])[\s\S])+"  # words, and what lies between them
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# What stands in tokenizer.json, and the same in Python's words, for ASCII.
_SPLITS = {
    " ?[^(\\s|[.,!?…。，、।۔،])]+": _BLOOM,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": _LLAMA3,
}


class Words(dict[str, list[int]]):
    """The tokens of words, asked for when they are first looked up."""

    def __init__(self, tokenizer: Tokenizer, pattern: str) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._words = re.compile(pattern, re.ASCII).findall
        added = tokenizer.get_added_tokens_decoder().values()
        self._added = [token.content for token in added if not (token.special and tokenizer.encode_special_tokens)]

    def __missing__(self, word: str) -> list[int]:
        ids = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(word) <= _LONGEST:
            if len(self) >= _MOST:
                self.clear()
            self[word] = ids
        return ids

    def tokens(self, text: str) -> list[int] | None:
        """The tokens of `text`; `None` where the library has to be asked."""
        if not text.isascii() or any(token in text for token in self._added):
            return None
        return list(chain.from_iterable(map(self.__getitem__, self._words(text))))


def words_of(tokenizer: Tokenizer) -> Words | None:
    """A memory for the words of `tokenizer`, which nobody changes meanwhile; `None` for one of another make."""
    if tokenizer.normalizer is not None or tokenizer.truncation is not None or tokenizer.padding is not None:
        return None
    if tokenizer.pre_tokenizer is None or getattr(tokenizer.model, "dropout", None):
        return None
    pattern = _pattern(json.loads(tokenizer.pre_tokenizer.__getstate__()))
    return None if pattern is None else Words(tokenizer, pattern)


def _pattern(declared: dict[str, Any]) -> str | None:
    *before, last = declared["pretokenizers"] if declared["type"] == "Sequence" else [declared]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        return _GPT2 if last["use_regex"] else None
    (first,) = before
    if first["type"] == "Digits":
        return _DIGITS_GPT2 if first["individual_digits"] and last["use_regex"] else None
    whole = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"] and not last["use_regex"]
    return _SPLITS.get(first["pattern"].get("Regex", "")) if whole else None
