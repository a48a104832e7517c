"""A tokenizer that tells where in a text each token begins, and tokens with what each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from corolla.client.tokenizer import TextTokenizer
from corolla.data.offsets import Located, Locator, Text
from corolla.errors import CallerError

Ids = npt.NDArray[np.int32]

IGNORED = -100  # the label of a token that is not trained on, as torch's cross entropy has it


class Kind(IntEnum):
    """What a token is, as `token_type_ids` have it."""

    PROMPT = 0
    COMPLETION = 1
    PADDING = 2
    END = 3  # the end of an article; trained on like a completion


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Tokens side by side with their kinds: an article, or a sequence of several.

    `input_ids`, `token_type_ids` (values of `Kind`) and, where there are categories, `category_ids`: int32 `[T]`.
    """

    input_ids: Ids
    token_type_ids: Ids
    category_ids: Ids | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(*(None if column is None else column[part] for column in self.columns))  # type: ignore[arg-type]

    @property
    def columns(self) -> tuple[Ids, Ids, Ids | None]:
        return self.input_ids, self.token_type_ids, self.category_ids

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """Which tokens are trained on, `[T]`."""
        return (self.token_type_ids == Kind.COMPLETION) | (self.token_type_ids == Kind.END)

    @property
    def labels(self) -> Ids:
        """`input_ids` where they are trained on, else `IGNORED`: int32 `[T]`. The shift by one is the model's."""
        return np.where(self.trained, self.input_ids, np.int32(IGNORED))

    @property
    def segments(self) -> Ids:
        """Which article of the sequence each token is of, from 0, padding -1: int32 `[T]`. Tokens of others are not attended to."""
        ends = self.token_type_ids == Kind.END
        before = np.cumsum(ends) - ends
        return np.where(self.token_type_ids == Kind.PADDING, -1, before).astype(np.int32)


def count(tokens: Tokens, kind: Kind) -> int:
    """How many of `tokens` are of a kind."""
    return int((tokens.token_type_ids == kind).sum())


def concatenated(parts: Sequence[Tokens]) -> Tokens:
    """The parts, at least one, after one another. All of them have categories or none has."""
    ids, kinds, categories = zip(*(part.columns for part in parts), strict=True)
    return Tokens(np.concatenate(ids), np.concatenate(kinds), None if categories[0] is None else np.concatenate(categories))


class TrainingTokenizer(TextTokenizer):
    """A model's tokenizer, as `TextTokenizer` reads it, with what preparing data needs."""

    @cached_property
    def end_id(self) -> int:
        """The token that ends an article: the tokenizer's end token, or the first that the model's files name.

        Raises `CallerError` when there is none.
        """
        named = self.special_tokens.get("eos_token")
        if named is not None and (token_id := self.token_id(named)) is not None:
            return token_id
        if not self.end_ids:
            raise CallerError(f"the tokenizer in {self.directory} has no end token: name one as eos_token in tokenizer_config.json")
        return self.end_ids[0]

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def spelled(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` with special tokens written out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def locate(self, texts: Sequence[Text]) -> list[Located | CallerError]:
        """The tokens of many texts: of plain ones as `encode_plain` gives them, else as `encode` does. See `Locator`."""
        if len(kinds := {text.plain for text in texts}) > 1:
            return [located for text in texts for located in self.locate([text])]
        return (self._plain_locator if True in kinds else self._locator).locate(texts)

    @cached_property
    def _locator(self) -> Locator:
        return Locator(self._tokenizer)

    @cached_property
    def _plain_locator(self) -> Locator:
        return Locator(self._plain)
