"""The words of docs/architecture.md as plain dataclasses: what every part of Corolla speaks.

Nothing here imports torch: a thin client and `corolla --help` need these words too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from corolla.errors import CorollaError, InvalidSetting

if TYPE_CHECKING:
    import torch

MAX_STEP_TOKENS = 8192  # rows of one step; a longer history goes in several, the settings with the last


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A contiguous range of blocks `[start, end)`."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise InvalidSetting("blocks", f"{self.start}:{self.end} is no range; give START:END with 0 <= START < END")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end token or a stop sequence
    LENGTH = "length"  # the limit of tokens, or the end of the context


# Smaller ones mean nothing in float32: logits divided by them overflow, and 1 - top_p is 1.
_LEAST_TEMPERATURE, _LEAST_TOP_P = 1e-3, 1e-6
_MOST_TOKENS = 2**31 - 1  # of an answer
_MOST_STOPS = 1024  # of either kind
_MOST_STOP_CHARACTERS = 16384  # of all stop sequences together
_INT64 = 2**63 - 1

# The spellings that other interfaces use for the same settings.
_ALIASES = {
    "max_new_tokens": "max_tokens_to_generate",
    "max_tokens": "max_tokens_to_generate",
    "max_completion_tokens": "max_tokens_to_generate",
    "stop": "stop_sequences",
}


def setting_name(spelling: str) -> str:
    """The name in `GenerationSettings` of a setting as other interfaces spell it; any other word is its own."""
    return _ALIASES.get(spelling, spelling)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How an answer is sampled and where it ends; names and ranges are BLOOMChat's inference settings.

    Raises `InvalidSetting` for a value outside its range. `parse` also takes the common spellings.
    """

    max_tokens_to_generate: int = 256  # 1..2^31 - 1
    do_sample: bool = False
    temperature: float = 1.0  # [0.001, 2]; BLOOMChat's ends at 1, OpenAI's interface goes on to 2
    top_k: int | None = None  # 1..vocabulary; None keeps every token
    top_p: float = 1.0  # [0.000001, 1]
    repetition_penalty: float = 1.0  # [1, 2], after CTRL (Keskar et al., 2019)
    top_logprobs: int = 0  # 0..20 alternatives reported for each token
    prompt_logprobs: bool = False  # `Scores` of the prompt's own tokens first; nothing of it is taken from a cache
    seed: int = 0  # the token at position p is drawn by a generator of (seed, p)
    stop_sequences: tuple[str, ...] = ()  # matched in text by the client; never part of the answer; at most 1024, of 16,384 characters
    stop_token_ids: tuple[int, ...] = ()  # matched by the engine; never part of the answer's text; at most 1024

    def __post_init__(self) -> None:
        _check_integer("max_tokens_to_generate", self.max_tokens_to_generate, 1, _MOST_TOKENS)
        _check_real("temperature", self.temperature, _LEAST_TEMPERATURE, 2.0)
        _check_real("top_p", self.top_p, _LEAST_TOP_P, 1.0)
        _check_real("repetition_penalty", self.repetition_penalty, 1.0, 2.0)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1, _INT64)
        _check_integer("top_logprobs", self.top_logprobs, 0, 20)
        _check_integer("seed", self.seed, 0, _INT64)
        for name in ("do_sample", "prompt_logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidSetting(name, f"{_shown(getattr(self, name))} is neither true nor false")
        _check_stops("stop_sequences", self.stop_sequences, _is_text, "non-empty strings")
        _check_stops("stop_token_ids", self.stop_token_ids, _is_token, "token ids")
        if sum(map(len, self.stop_sequences)) > _MOST_STOP_CHARACTERS:
            raise InvalidSetting("stop_sequences", f"all together have more than {_MOST_STOP_CHARACTERS} characters")
        object.__setattr__(self, "stop_sequences", tuple(self.stop_sequences))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @classmethod
    def parse(cls, **options: Any) -> GenerationSettings:
        """Settings from an interface: `None` means the default, a `temperature` of 0 means greedy.

        A positive temperature given without `do_sample` asks for sampling.
        """
        names = {field.name for field in fields(cls)}
        given: dict[str, Any] = {}
        for spelling, value in options.items():
            name = setting_name(spelling)
            if name not in names:
                raise InvalidSetting(spelling, f"there is no such setting; there are {', '.join(sorted(names))}")
            if value is None:
                continue
            if name in given:
                raise InvalidSetting(spelling, f"given twice: it is the same setting as {name}")
            given[name] = value
        if isinstance(given.get("stop_sequences"), str):
            given["stop_sequences"] = (given["stop_sequences"],)
        if given.get("temperature") == 0 and not isinstance(given["temperature"], bool):
            del given["temperature"]
            given["do_sample"] = False
        elif "temperature" in given:
            given.setdefault("do_sample", True)
        return cls(**given)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
        raise InvalidSetting(name, f"{_shown(value)} is not an integer from {low} to {high}")


def _check_real(name: str, value: object, low: float, high: float) -> None:
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high):  # NaN is outside
        raise InvalidSetting(name, f"{_shown(value)} is not a number in [{low:g}, {high:g}]")


def _check_stops(name: str, given: object, fits: Callable[[object], bool], what: str) -> None:
    if not (isinstance(given, (list, tuple)) and len(given) <= _MOST_STOPS and all(map(fits, given))):
        raise InvalidSetting(name, f"{_shown(given)} is not a list of at most {_MOST_STOPS} {what}")


def _is_text(item: object) -> bool:
    """Whether it is a string that has a spelling in UTF-8: half of a surrogate pair has none."""
    return isinstance(item, str) and item != "" and not any("\ud800" <= character <= "\udfff" for character in item)


def _is_token(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _INT64


def _shown(value: object) -> str:
    """A value in an error's sentence, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has none
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


# Soft prompts. Their rows stand at the first positions of a session, whose history begins with as many placeholder ids.


class PromptName(msgspec.Struct, frozen=True, omit_defaults=True, rename={"tokens": "k"}):
    """What a step calls its soft prompt: `name` is the same for the same content, among the prompts of one client."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEP_TOKENS)]  # positions that it takes, from 0 on
    deep: bool = False  # whether every block adds rows of its own at these positions


@dataclass(frozen=True, slots=True, eq=False)
class PromptPart:
    """What the servers of the blocks `span` need of a soft prompt of P tokens, in any floating dtype."""

    name: PromptName
    span: Span
    input: torch.Tensor | None = None  # [P, hidden], in place of embeddings; None where hidden states come in
    deep: torch.Tensor | None = None  # [blocks of the span, P, hidden], added at each block's input


# LoRA adapters (Hu et al., 2021): what is added to the products of a model's blocks.


class Factors(NamedTuple):
    """What is added to one product of rows x: `x a' b'`, with a [rank, inputs] and b [outputs, rank], its scale in b."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AdapterPart:
    """What the servers of the blocks `span` need of an adapter, float32 on the CPU.

    `digest` names its content, and is the hash of `digests`, which are those of every block of the model (`models.adapters`): whoever
    gets a part sees whether it is of the adapter that is meant.
    """

    digest: str
    span: Span
    blocks: tuple[Mapping[str, Factors], ...]  # of each block of the span, by the product's name in `models.block.Block`
    digests: tuple[bytes, ...]

    def of(self, span: Span) -> AdapterPart:
        """What of it the blocks `span` need, which are among its own."""
        return AdapterPart(self.digest, span, self.blocks[span.start - self.span.start : span.end - self.span.start], self.digests)


# Messages from a client (or the server before) to a server.


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward of some tokens of a session: "from position `start`, here is `payload`".

    A server that has cached more than `start` truncates to `start`; one that has less answers `Gap`. What a server has cached
    of older generations counts only below `began`, where this generation's rows begin: from there on the history may be another.
    """

    session: str
    start: int
    payload: Sequence[int] | torch.Tensor  # token ids for the span with block 0, else hidden states [tokens, hidden]
    generation: int = 0  # of the route; replies of an older one are ignored
    settings: GenerationSettings | None = None  # sample after the last token and go on, until the answer ends
    adapter: str = ""  # the digest of a LoRA adapter; a server that lacks it asks for it, or takes none
    tokens: Sequence[int] = ()  # the ids of the rows where the payload is hidden states, as far as they are known
    span: Span | None = None  # the blocks to compute, of those that the server holds; None is all of them
    asked: int = 0  # unix milliseconds when the answer was asked for: whoever asked first is served first, on every server
    more: bool = False  # further rows follow, in steps of their own
    wants_hidden: bool = False  # answer with hidden states from the last block too, and sample nothing
    prompt: PromptName | None = None  # put in and added at the positions below its tokens; a server that lacks it asks for it
    client: str = ""  # whose prompt that is
    brings_adapter: bool = False  # whether the client has the adapter, and gives it to servers that ask
    drafts: int = 0  # so many of the last rows are guesses, kept as far as the head samples the same tokens
    began: int | None = None  # the position of the generation's first row; None: `start`, in its first step

    @property
    def began_at(self) -> int:
        """The position of the generation's first row."""
        return self.start if self.began is None else self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A forward or a backward of whole sequences, without a session.

    Args:
        client, number: who asks, and the call's number there.
        span: the blocks to compute, of those that the server holds.
        lengths: the rows of each sequence, at least 1; they lie one behind another and each attends to itself only.
        back: whether gradients are asked for.
        prompt: a deep prompt that came before.
        keep: whether to keep what the forward leaves for a backward.
        kept: the number of the forward that was kept, for a backward that brings the gradients' rows only; 0 for one that brings
            the rows that entered, and the gradients' behind them.
    """

    client: str
    number: int
    span: Span
    lengths: tuple[int, ...]
    back: bool
    prompt: PromptName | None = None
    keep: bool = False
    kept: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Give:
    """A soft prompt or an adapter for a server that lacks it; the session's next step names it."""

    session: str
    part: PromptPart | AdapterPart


# Replies. `position` and `start` count tokens from the beginning of the session.


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """The hidden states [tokens, hidden] that leave a span without the head."""

    session: str
    generation: int
    start: int
    hidden: torch.Tensor
    tokens: tuple[int, ...] = ()  # the ids of these rows, as far as they are known
    last: bool = False  # whether no row of the step is left to compute
    drafts: int = 0  # as in `Step`


@dataclass(frozen=True, slots=True, eq=False)
class Failed:
    """The step ended in an error; the session's cache may be gone, the client's history is not."""

    session: str
    generation: int
    error: CorollaError
