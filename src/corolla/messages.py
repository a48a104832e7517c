"""The messages that peers exchange: what a frame's header says, and the tensor that follows it.

Every message is a msgspec struct. Names are short on the wire and fields at their default are left out, so that a decode
step costs little more than its hidden states. A later minor version may add fields and kinds, which older peers ignore
or refuse politely; whatever changes a meaning or a default needs a new major version. Decoding bounds every number to 64
bits and every text and list before it is allocated.

`arrays` turns tensors into an `Array` and back, `convert` these messages into those of `corolla.types`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

import msgspec

from corolla.types import MAX_STEP_TOKENS, Failed, FinishReason, Give, Hidden, PromptName, Step

MAX_ROWS = 2**16  # of one tensor
MAX_HIDDEN = 2**20  # values in one row
MAX_DRAFTS = 15  # guesses in one step
MAX_HOPS = 256  # servers of one route
Q8_BLOCK = 64  # values that share a scale

WireDtype = Literal["float32", "bfloat16", "float16", "q8"]

_INT64 = msgspec.Meta(ge=-(2**63), le=2**63 - 1)
Int: TypeAlias = Annotated[int, _INT64]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=256)]  # of a peer, a session, an adapter, an error
MAX_TEXT = 4096  # characters of an error's sentence
_MAX_STOPS = 4096
_MAX_SEQUENCES = 1024  # of one forward or backward

_SHORT = {
    "session": "s",
    "generation": "g",
    "start": "b",
    "end": "e",
    "position": "p",
    "tokens": "k",
    "token_id": "k",
    "hidden": "h",
    "settings": "o",
    "route": "r",
    "hop": "i",
    "client": "c",
    "adapter": "a",
    "peer": "w",
    "timings": "m",
    "logprob": "l",
    "top_logprobs": "n",
    "finish": "f",
    "dtype": "d",
    "shape": "z",
    "asked": "j",
    "timed": "u",
    "output": "v",
    "more": "y",
    "drafts": "q",
    "began": "z",
    "queue": "q",
    "compute": "c",
    "transfer": "x",
}
_NO_BYTES = memoryview(b"")


class _Wire(msgspec.Struct, frozen=True, omit_defaults=True, rename=_SHORT):
    pass


class _Kind(_Wire, frozen=True, tag_field="t"):
    pass


class Array(_Wire, frozen=True):
    """A tensor of the message: `shape` is [rows, values], `data` its bytes, row by row, little endian.

    `data` is not part of the header: the frame carries it behind. In `q8` the int8 codes come first, then one float32 scale
    for every 64 values of a row; blocks end with their row, so a row's bytes do not depend on the rows it travels with.
    """

    dtype: WireDtype
    shape: tuple[Annotated[int, msgspec.Meta(ge=1, le=MAX_ROWS)], Annotated[int, msgspec.Meta(ge=1, le=MAX_HIDDEN)]]
    data: memoryview = _NO_BYTES

    @property
    def nbytes(self) -> int:
        """How many bytes `data` must have."""
        rows, values = self.shape
        if self.dtype == "q8":
            return rows * (values + 4 * math.ceil(values / Q8_BLOCK))
        return rows * values * (4 if self.dtype == "float32" else 2)


class Hop(_Wire, frozen=True):
    """A server and the blocks `[start, end)` that it computes: its span or a part of it."""

    peer: Name
    start: Count
    end: Count

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError(f"{self.start}:{self.end} is no range of blocks")


class HopTiming(_Wire, frozen=True):
    """Where one server's share of a step went, in seconds."""

    peer: Name
    queue: float  # until the forward began
    compute: float
    transfer: float  # the way to the server: half of the round trip last measured

    def __post_init__(self) -> None:
        for value in (self.queue, self.compute, self.transfer):
            if not 0 <= value < math.inf:
                raise ValueError(f"{value} s is no time")


Timings: TypeAlias = Annotated[tuple[HopTiming, ...], msgspec.Meta(max_length=MAX_HOPS)]


class SettingsFrame(_Wire, frozen=True):
    """`types.GenerationSettings` as they came: ranges are checked by `to_settings`, for a bad one is the caller's fault. Stop sequences
    are not among them: the client matches them by itself."""

    max_tokens_to_generate: Int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: Int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    top_logprobs: Int = 0
    prompt_logprobs: bool = False
    seed: Int = 0
    stop_token_ids: Annotated[tuple[Int, ...], msgspec.Meta(max_length=_MAX_STOPS)] = ()


# To a server.


class StepFrame(_Kind, frozen=True, tag="step"):
    """`types.Step`, and the way that it and its answer go.

    `tokens` are the ids of these rows, sent to every hop: the head needs the history and caches are found by it. The first
    hop computes from them, the others from `hidden`, one row a token. `hop` is the receiver's place in `route`; without a
    route the receiver goes on with the one that this session and generation had before, and with what came with it: its
    settings, `client`, `asked`, `timed` and `output`. `client` gets the replies.

    The last `drafts` tokens are guesses: the head answers those that it samples itself, and goes on after the last of them.

    A step with a route says where its generation `began` (None: at `start`). A server that has not taken the generation's rows
    from there on truncates to `began` first: what it caches behind that belongs to an older history.

    With an `output` of "hidden" the rows may come without their ids, the first hop takes hidden states too, and the last one
    answers a `HiddenFrame` in place of a token.
    """

    session: Name
    generation: Count
    start: Count
    tokens: Annotated[tuple[Int, ...], msgspec.Meta(max_length=MAX_STEP_TOKENS)]
    hidden: Array | None = None
    settings: SettingsFrame | None = None
    route: Annotated[tuple[Hop, ...], msgspec.Meta(max_length=MAX_HOPS)] = ()
    hop: Count = 0
    client: Name = ""
    adapter: Name = ""
    timings: Timings = ()
    asked: Count = 0
    more: bool = False  # further rows follow in frames of their own
    timed: bool = False  # fill `timings` on the way, and send them with each token
    output: Literal["token", "hidden"] = "token"
    prompt: PromptName | None = None
    drafts: Annotated[int, msgspec.Meta(ge=0, le=MAX_DRAFTS)] = 0
    began: Count | None = None

    def __post_init__(self) -> None:
        if self.began is not None and self.began > self.start:
            raise ValueError(f"a step begins at {self.start}, before its generation, which began at {self.began}")
        if self.drafts and self.drafts >= len(self.tokens):
            raise ValueError(f"{self.drafts} guesses come among {len(self.tokens)} tokens, the first of which is none")
        if len(self.tokens) > MAX_STEP_TOKENS:  # decoding never comes here with more
            raise ValueError(f"{len(self.tokens)} tokens in one step, which carries {MAX_STEP_TOKENS}: send them in several")
        if self.hidden is not None:
            rows = self.hidden.shape[0]
            if rows > MAX_STEP_TOKENS:
                raise ValueError(f"{rows} rows in one step, which carries {MAX_STEP_TOKENS}: send them in several")
            if rows != len(self.tokens) and (self.tokens or self.output == "token"):
                raise ValueError(f"{len(self.tokens)} tokens come with {rows} rows of hidden states")
        if self.route and self.hop >= len(self.route):
            raise ValueError(f"hop {self.hop} lies outside a route of {len(self.route)} servers")
        for before, after in zip(self.route, self.route[1:], strict=False):
            if before.end != after.start:
                raise ValueError(f"the route jumps from block {before.end} to block {after.start}")


class PromptFrame(_Kind, frozen=True, tag="prompt"):
    """`types.PromptPart`: rows in float32, those for the input first where `has_input`, then, of a deep prompt, each block's.

    It is not answered. A server keeps the prompts of each client apart, and forgets those longest unused; a step or a call that
    names one that it lacks is answered by a `FailedFrame` of the kind "PromptNeeded".
    """

    name: PromptName
    start: Count
    end: Count
    hidden: Array
    has_input: bool = False

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError(f"{self.start}:{self.end} is no range of blocks")
        if self.hidden.dtype != "float32":
            raise ValueError(f"a soft prompt travels as float32, and not as {self.hidden.dtype}")
        pieces = self.has_input + (self.end - self.start if self.name.deep else 0)
        if self.hidden.shape[0] != pieces * self.name.tokens:
            raise ValueError(f"the prompt brings {self.hidden.shape[0]} rows in place of {pieces} times {self.name.tokens}")


class ProductFrame(_Wire, frozen=True):
    """The shapes of what is added to one product of a block: A [rank, inputs] and B [outputs, rank]."""

    product: Name
    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_HIDDEN)]
    inputs: Annotated[int, msgspec.Meta(ge=1, le=MAX_HIDDEN)]
    outputs: Annotated[int, msgspec.Meta(ge=1, le=MAX_HIDDEN)]

    @property
    def values(self) -> int:
        return self.rank * (self.inputs + self.outputs)


class AdapterFrame(_Kind, frozen=True, tag="adapter"):
    """One block of `types.AdapterPart`: for each of its products A and then B, row by row, in float32; zeros fill the last row.

    It is not answered. A server that takes adapters keeps it; a step that names an adapter that it lacks is answered by a
    `FailedFrame` of the kind "AdapterNeeded".
    """

    digest: Name
    digests: Annotated[tuple[Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)], ...], msgspec.Meta(max_length=1024)]
    block: Count
    products: Annotated[tuple[ProductFrame, ...], msgspec.Meta(max_length=8)]
    hidden: Array

    def __post_init__(self) -> None:
        if self.hidden.dtype != "float32":
            raise ValueError(f"an adapter travels as float32, and not as {self.hidden.dtype}")
        if len({product.product for product in self.products}) < len(self.products):
            raise ValueError("an adapter brings a product twice")
        rows, width = self.hidden.shape
        values = sum(product.values for product in self.products)
        if rows != max(1, math.ceil(values / width)):
            raise ValueError(f"the adapter's products take {values} values, which do not make {rows} rows of {width}")


class Cancel(_Kind, frozen=True, tag="cancel"):
    """Stop the answer that is being written; what is cached stays cached."""

    session: Name
    generation: Count


class Close(_Kind, frozen=True, tag="close"):
    """Forget the session: its pages are free at once.

    With a `generation`, a later one stays: a step on a new route may come before the message that ends the old one.
    """

    session: Name
    generation: Count | None = None


# Replies. `position` and `start` count tokens from the beginning of the session.


_Alternatives: TypeAlias = Annotated[tuple[tuple[Count, float], ...], msgspec.Meta(max_length=64)]


class Token(_Kind, frozen=True, tag="token"):
    """A sampled token and the place it takes in the session's history.

    `more` and `drafts` are for the server of the engine that sampled it, and not sent.
    """

    session: Name
    generation: Count
    position: Count
    token_id: Count
    logprob: float  # natural logarithm, of the distribution that was sampled from before temperature and cuts
    top_logprobs: _Alternatives = ()
    finish: FinishReason | None = None
    timings: Timings = ()  # of the servers of the route, where they were asked for; with the last token of a step
    more: bool = False  # another token of the same step follows
    drafts: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DRAFTS)] = ()  # guesses of the tokens that follow it

    def __post_init__(self) -> None:
        for value in (self.logprob, *(other for _, other in self.top_logprobs)):
            if not value <= 0.01:  # rounding may pass 0; nan is refused too
                raise ValueError(f"{value} is no logarithm of a probability")


class Score(msgspec.Struct, frozen=True, array_like=True):
    """What the model made of a token that was given; as in `Token`."""

    logprob: float
    top_logprobs: _Alternatives = ()


class Scores(_Kind, frozen=True, tag="scores"):
    """The scores of a prompt's tokens from position `start` on. The first token of a session has none."""

    session: Name
    generation: Count
    start: Count
    scores: Annotated[tuple[Score, ...], msgspec.Meta(max_length=64)]

    def __post_init__(self) -> None:
        for score in self.scores:
            for logprob in (score.logprob, *(other for _, other in score.top_logprobs)):
                if not logprob <= 0.01:  # as in `Token`
                    raise ValueError(f"{logprob} is no logarithm of a probability")


class HiddenFrame(_Kind, frozen=True, tag="hidden"):
    """`types.Hidden`."""

    session: Name
    generation: Count
    start: Count
    hidden: Array
    timings: Timings = ()


class Cached(_Kind, frozen=True, tag="cached"):
    """The answer to a step without settings: the session is cached up to `position`."""

    session: Name
    generation: Count
    position: Count


class Gap(_Kind, frozen=True, tag="gap"):
    """The server has fewer tokens than the step's start: send again from `have`."""

    session: Name
    generation: Count
    have: Count


class FailedFrame(_Kind, frozen=True, tag="failed"):
    """`types.Failed` at the server `peer`; `kind` is the error's class in `corolla.errors`, `details` its attributes."""

    session: Name
    generation: Count
    kind: Name
    message: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    retry_after: float | None = None  # seconds
    peer: Name = ""
    details: Annotated[dict[Name, Int | str], msgspec.Meta(max_length=8)] = {}

    def __post_init__(self) -> None:
        if self.retry_after is not None and not 0 <= self.retry_after < math.inf:
            raise ValueError(f"{self.retry_after} s is no time to wait")


# The hidden states' way without a session: servers keep nothing between these. Answered by a `ResultFrame` or a `FailedFrame`
# whose session is the call's number in decimal.


_Length: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MAX_STEP_TOKENS)]


class _Call(_Kind, frozen=True):
    """Rows of several sequences, one behind another, through blocks `[start, end)`; each sequence attends to itself only.

    `lengths` are the rows of each sequence. `prompt` names a deep prompt that came before, in a `PromptFrame`: its soft tokens are
    added to the first rows of every sequence at the input of each block.
    """

    call: Count
    start: Count
    end: Count
    lengths: Annotated[tuple[_Length, ...], msgspec.Meta(min_length=1, max_length=_MAX_SEQUENCES)]
    hidden: Array
    prompt: PromptName | None = None

    @property
    def rows(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    def _check(self, copies: int) -> None:
        if self.start >= self.end:
            raise ValueError(f"{self.start}:{self.end} is no range of blocks")
        if self.hidden.shape[0] != copies * self.rows:
            raise ValueError(f"the call brings {self.hidden.shape[0]} rows, and its sequences make {copies * self.rows}")
        if self.prompt is not None and self.prompt.tokens > min(self.lengths):
            raise ValueError(f"{self.prompt.tokens} soft tokens are added to sequences of at least {min(self.lengths)} rows")
        if self.prompt is not None and not self.prompt.deep:
            raise ValueError("a call names a prompt that is not deep")


class ForwardFrame(_Call, frozen=True, tag="forward"):
    """Answered by the rows that leave the last block. To `keep` is to save a backward the second forward: see there."""

    keep: bool = False

    def __post_init__(self) -> None:
        self._check(1)


class BackwardFrame(_Call, frozen=True, tag="backward"):
    """The array holds the inputs' rows, then the gradients' with respect to the outputs. Answered by the gradients with respect to
    the inputs, then to the deep prompt's rows, block by block.

    With `kept`, the number of a forward of the same sequences that was kept, the array holds the gradients' rows only. A server
    that has it no more answers a `FailedFrame` of the kind "ActivationsGone".
    """

    kept: Count = 0

    def __post_init__(self) -> None:
        self._check(1 if self.kept else 2)


class ResultFrame(_Kind, frozen=True, tag="result"):
    call: Count
    hidden: Array
    timings: Timings = ()


# Between any two peers.


class Ask(_Kind, frozen=True, tag="where"):
    """How is this session getting on? Answered by `Whereabouts`."""

    session: Name
    generation: Count


class Whereabouts(_Kind, frozen=True, tag="here"):
    """`cached` tokens of the session lie at the sender and `pending` rows wait to be computed; 0 where it does not know that generation."""

    session: Name
    generation: Count
    cached: Count
    pending: Count


class Leaving(_Kind, frozen=True, tag="leaving"):
    """The sender drains: it takes no new sessions, and those who have one with it should go on elsewhere as soon as they can.
    It serves them until then."""


class AskCounters(_Kind, frozen=True, tag="ask"):
    """Answered by a server's `Counters`."""


class Counters(_Kind, frozen=True, tag="counters"):
    """What happened at a server since it began, and what it holds for clients now, by name."""

    counts: Annotated[dict[Name, Count], msgspec.Meta(max_length=64)]


class Ping(_Kind, frozen=True, tag="ping"):
    """Answered by a `Pong` of the same nonce, to measure the round trip and to see that the peer lives."""

    nonce: Count


class Pong(_Kind, frozen=True, tag="pong"):
    """`failing`: the sender lives, but its engine is dead or stalled, and computes nothing."""

    nonce: Count
    failing: bool = False


class Refused(_Kind, frozen=True, tag="refused"):
    """The polite answer to an `Unknown` message: this peer is older and does not know that kind. Never answered itself."""

    kind: Name


class Unknown(msgspec.Struct, frozen=True):
    """What a frame of a kind that this version does not know decodes to. It cannot be sent: answer with `Refused`."""

    kind: str


Message: TypeAlias = Step | Cancel | Close | Give  # to an engine
Reply: TypeAlias = Token | Scores | Hidden | Cached | Gap | Failed  # of an engine
WireMessage: TypeAlias = (
    StepFrame
    | Cancel
    | Close
    | Token
    | Scores
    | HiddenFrame
    | Cached
    | Gap
    | FailedFrame
    | PromptFrame
    | AdapterFrame
    | ForwardFrame
    | BackwardFrame
    | ResultFrame
    | Ask
    | Whereabouts
    | Leaving
    | AskCounters
    | Counters
    | Ping
    | Pong
    | Refused
)
