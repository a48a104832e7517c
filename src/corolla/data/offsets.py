"""Many texts as tokens at once, and where in them some places come to lie.

The tokenizers library can leave out where tokens lie in a text, which takes a fifth of its time. Where every token stands for its own
bytes, as in the byte-level tokenizers of GPT-2, BLOOM or Llama 3, their lengths tell it too; elsewhere the library is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, decoders

from corolla.data.words import words_of
from corolla.errors import CallerError

_ANY = 2**40
_PROBE = " a  b\n\u00e9 \u2603"


class Text(NamedTuple):
    """A text to tokenize, and places in it (in characters, ascending) of which it is asked how many tokens begin before each.

    In a `plain` one the special tokens that are written out are words like any other.
    """

    text: str
    places: Sequence[int] = ()
    plain: bool = False


class Located(NamedTuple):
    """A text's tokens, and how many begin before each of its places."""

    ids: list[int]
    begun: list[int]


class Locator:
    """Tokenizes by `tokenizer`, which nobody changes meanwhile."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._widths = _widths(tokenizer)
        self._words = words_of(tokenizer)

    def locate(self, texts: Sequence[Text]) -> list[Located | CallerError]:
        """Each text's tokens, without those that the tokenizer puts around; an error for what is no Unicode text."""
        try:
            return list(self._together(texts))
        except (UnicodeEncodeError, TypeError):
            if len(texts) == 1:
                return [CallerError("the text is not valid Unicode: check its encoding")]
            return [located for text in texts for located in self.locate([text])]

    def _together(self, texts: Sequence[Text]) -> list[Located]:
        if self._widths is None:
            encodings = self._tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)
            return [_asked(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]
        ids = self._tokens([text.text for text in texts])
        firsts = list(accumulate(map(len, ids), initial=0))
        flat = np.fromiter(chain.from_iterable(ids), np.int32, firsts[-1])
        begins = np.concatenate([[0], np.cumsum(self._widths[flat])])  # of each token, in bytes of all texts together
        nbytes = [_nbytes(text.text, len(text.text)) for text in texts]
        bounds = begins[firsts].tolist()
        places = [bounds[index] + _nbytes(text.text, place) for index, text in enumerate(texts) for place in text.places]
        begun = iter(np.searchsorted(begins[:-1], places).tolist())
        located = []
        for index, text in enumerate(texts):
            found = Located(ids[index], [next(begun) - firsts[index] for _ in text.places])
            if bounds[index + 1] - bounds[index] != nbytes[index]:  # a byte without a token, an added token that took the blanks around it
                found = _asked(self._tokenizer.encode(text.text, add_special_tokens=False), text)
            located.append(found)
        return located

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        known = [None if self._words is None else self._words.tokens(text) for text in texts]
        asked = [text for text, ids in zip(texts, known, strict=True) if ids is None]
        found = iter(self._tokenizer.encode_batch_fast(asked, add_special_tokens=False))
        return [next(found).ids if ids is None else ids for ids in known]


def _widths(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """How many bytes each token stands for, by its id; None where that cannot be told."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel) or tokenizer.normalizer is not None:
        return None
    encoding = tokenizer.encode(_PROBE, add_special_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    widths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, token_id in vocabulary.items():
        widths[token_id] = len(token.encode()) if token_id in added else len(token)
    if (unknown := getattr(tokenizer.model, "unk_token", None)) is not None:
        widths[vocabulary[unknown]] = _ANY  # where it stands the bytes never add up
    ends = np.cumsum(widths[encoding.ids])
    if ends[-1] != len(_PROBE.encode()):  # with a blank of its own before the text
        return None
    begins = [0, *ends[:-1].tolist()]
    if any(_nbytes(_PROBE, start) > begin for (start, _), begin in zip(encoding.offsets, begins, strict=True)):  # blanks trimmed
        return None
    return widths


def _nbytes(text: str, end: int) -> int:
    """The bytes of the first `end` characters."""
    return min(end, len(text)) if text.isascii() else len(text[:end].encode())


def _asked(encoding: Encoding, text: Text) -> Located:
    ids = encoding.ids
    return Located(ids, [_begun_before(encoding, len(ids), place, len(text.text)) for place in text.places])


def _begun_before(encoding: Encoding, count: int, place: int, length: int) -> int:
    """Tokens ascend by where they begin. One by one is asked for, because a list of all places costs more than the rest does."""
    token = next((found for at in range(place, length) if (found := encoding.char_to_token(at)) is not None), count)
    while token < count and _begin(encoding, token) < place:
        token += 1
    while token and _begin(encoding, token - 1) >= place:  # some tokens have no character of their own
        token -= 1
    return token


def _begin(encoding: Encoding, token: int) -> int:
    place = encoding.token_to_chars(token)
    assert place is not None, "the token is one of the text's"
    return place[0]
