"""The messages that peers exchange: what a frame's header says, and the tensor that follows it.

Every message is a msgspec struct. Names are short on the wire and fields at their default are left out, so that a decode
step costs little more than its hidden states. A later minor version may add fields and kinds, which older peers ignore
or refuse politely; whatever changes a meaning or a default needs a new major version. Decoding bounds every number to 64
bits and every text and list before it is allocated.

This module imports no torch: only `to_array`, `from_array` and `check_finite` need it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec

from corolla import errors
from corolla.errors import CapacityError, CorollaError, InvalidSetting, PromptTooLong, ServerFault
from corolla.types import (
    Cached,
    Cancel,
    Close,
    Failed,
    FinishReason,
    Gap,
    GenerationSettings,
    Hidden,
    Message,
    Reply,
    Step,
    Token,
)

if TYPE_CHECKING:
    import torch

MAX_STEP_TOKENS = 8192  # rows of one step; a longer history goes in several, the settings with the last
MAX_HIDDEN = 2**20  # values in one row
MAX_HOPS = 256  # servers of one route
Q8_BLOCK = 64  # values that share a scale

WireDtype = Literal["float32", "bfloat16", "float16", "q8"]

_INT64 = msgspec.Meta(ge=-(2**63), le=2**63 - 1)
Int: TypeAlias = Annotated[int, _INT64]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=256)]  # of a peer, a session, an adapter, an error
_MAX_TEXT = 4096  # characters of an error's sentence
_MAX_STOPS = 4096

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
    "queue_s": "q",
    "compute_s": "c",
    "transfer_s": "x",
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
    shape: tuple[Annotated[int, msgspec.Meta(ge=1, le=MAX_STEP_TOKENS)], Annotated[int, msgspec.Meta(ge=1, le=MAX_HIDDEN)]]
    data: memoryview = _NO_BYTES

    @property
    def nbytes(self) -> int:
        """How many bytes `data` must have."""
        rows, values = self.shape
        if self.dtype == "q8":
            return rows * (values + 4 * math.ceil(values / Q8_BLOCK))
        return rows * values * (4 if self.dtype == "float32" else 2)


class Hop(_Wire, frozen=True):
    """One server of a route and the span `[start, end)` it computes."""

    peer: Name
    start: Count
    end: Count

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError(f"{self.start}:{self.end} is no range of blocks")


class HopTiming(_Wire, frozen=True):
    """Where one server's share of a step went, in seconds; `transfer_s` is the way to it."""

    peer: Name
    queue_s: float
    compute_s: float
    transfer_s: float

    def __post_init__(self) -> None:
        for value in (self.queue_s, self.compute_s, self.transfer_s):
            if not 0 <= value < math.inf:
                raise ValueError(f"{value} s is no time")


Timings: TypeAlias = Annotated[tuple[HopTiming, ...], msgspec.Meta(max_length=MAX_HOPS)]


class SettingsFrame(_Wire, frozen=True):
    """`types.GenerationSettings` as they came: ranges are checked by `to_settings`, for a bad one is the caller's fault."""

    max_tokens_to_generate: Int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: Int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    top_logprobs: Int = 0
    seed: Int = 0
    stop_sequences: Annotated[tuple[str, ...], msgspec.Meta(max_length=_MAX_STOPS)] = ()
    stop_token_ids: Annotated[tuple[Int, ...], msgspec.Meta(max_length=_MAX_STOPS)] = ()


# To a server.


class StepFrame(_Kind, frozen=True, tag="step"):
    """`types.Step`, and the way that it and its answer go.

    `tokens` are the ids of these rows, sent to every hop: the head needs the history and caches are found by it. The first
    hop computes from them, the others from `hidden`, one row a token. `hop` is the receiver's place in `route`; without a
    route the receiver goes on with the one that this session and generation had before. `client` gets the replies.
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

    def __post_init__(self) -> None:
        if len(self.tokens) > MAX_STEP_TOKENS:  # decoding never comes here with more
            raise ValueError(f"{len(self.tokens)} tokens in one step, which carries {MAX_STEP_TOKENS}: send them in several")
        if self.hidden is not None and self.hidden.shape[0] != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens come with {self.hidden.shape[0]} rows of hidden states")
        if self.route and self.hop >= len(self.route):
            raise ValueError(f"hop {self.hop} lies outside a route of {len(self.route)} servers")
        for before, after in zip(self.route, self.route[1:], strict=False):
            if before.end != after.start:
                raise ValueError(f"the route jumps from block {before.end} to block {after.start}")


class CancelFrame(_Kind, frozen=True, tag="cancel"):
    """`types.Cancel`."""

    session: Name
    generation: Count


class CloseFrame(_Kind, frozen=True, tag="close"):
    """`types.Close`."""

    session: Name


# Replies.


class TokenFrame(_Kind, frozen=True, tag="token"):
    """`types.Token`, with where the time of its step went when that was asked for."""

    session: Name
    generation: Count
    position: Count
    token_id: Count
    logprob: float
    top_logprobs: Annotated[tuple[tuple[Count, float], ...], msgspec.Meta(max_length=64)] = ()
    finish: FinishReason | None = None
    timings: Timings = ()

    def __post_init__(self) -> None:
        for value in (self.logprob, *(other for _, other in self.top_logprobs)):
            if not value <= 0.01:  # rounding may pass 0; nan is refused too
                raise ValueError(f"{value} is no logarithm of a probability")


class HiddenFrame(_Kind, frozen=True, tag="hidden"):
    """`types.Hidden`."""

    session: Name
    generation: Count
    start: Count
    hidden: Array


class CachedFrame(_Kind, frozen=True, tag="cached"):
    """`types.Cached`."""

    session: Name
    generation: Count
    position: Count


class GapFrame(_Kind, frozen=True, tag="gap"):
    """`types.Gap` at the server `peer`."""

    session: Name
    generation: Count
    have: Count
    peer: Name = ""


class FailedFrame(_Kind, frozen=True, tag="failed"):
    """`types.Failed` at the server `peer`; `kind` is the error's class in `corolla.errors`, `details` its attributes."""

    session: Name
    generation: Count
    kind: Name
    message: Annotated[str, msgspec.Meta(max_length=_MAX_TEXT)]
    retry_after: float | None = None  # seconds
    peer: Name = ""
    details: Annotated[dict[Name, Int | str], msgspec.Meta(max_length=8)] = {}

    def __post_init__(self) -> None:
        if self.retry_after is not None and not 0 <= self.retry_after < math.inf:
            raise ValueError(f"{self.retry_after} s is no time to wait")


# Between any two peers.


class Ping(_Kind, frozen=True, tag="ping"):
    """Answered by a `Pong` of the same nonce, to measure the round trip and to see that the peer lives."""

    nonce: Count


class Pong(_Kind, frozen=True, tag="pong"):
    nonce: Count


class Refused(_Kind, frozen=True, tag="refused"):
    """The polite answer to an `Unknown` message: this peer is older and does not know that kind. Never answered itself."""

    kind: Name


class Unknown(msgspec.Struct, frozen=True):
    """What a frame of a kind that this version does not know decodes to. It cannot be sent: answer with `Refused`."""

    kind: str


Request: TypeAlias = StepFrame | CancelFrame | CloseFrame
Answer: TypeAlias = TokenFrame | HiddenFrame | CachedFrame | GapFrame | FailedFrame
WireMessage: TypeAlias = Request | Answer | Ping | Pong | Refused


# Tensors.


def to_array(tensor: torch.Tensor, wire_dtype: WireDtype) -> Array:
    """`tensor` [rows, values] as it travels; shares memory with it where no conversion is needed, so leave it as it is until sent.

    In `q8` a value is off by at most 1/254 of the largest magnitude among its block of 64; a block that is not finite stays so.
    Raises `ServerFault` when a finite value does not fit float16.
    """
    import torch

    tensor = tensor.detach()
    rows, values = tensor.shape
    if wire_dtype == "q8":
        return Array("q8", (rows, values), _bytes_of(_quantize(tensor)))
    converted = tensor.to("cpu", getattr(torch, wire_dtype)).contiguous()
    if wire_dtype == "float16" and tensor.dtype != torch.float16 and not bool(converted.isfinite().all()):
        raise ServerFault("hidden states do not fit float16: let the servers exchange bfloat16, float32 or q8")
    return Array(wire_dtype, (rows, values), _bytes_of(converted.view(torch.uint8)))


def from_array(array: Array) -> torch.Tensor:
    """The tensor [rows, values] that `array` describes, on the CPU, in its dtype (float32 for `q8`).

    Shares memory with a writable `data`; bytes from the network are copied once. Raises `ProtocolError` when `data` has
    not the size that the shape asks for.
    """
    import torch

    if array.data.nbytes != array.nbytes:
        raise errors.ProtocolError(f"{array.dtype} of shape {array.shape} takes {array.nbytes} bytes, not {array.data.nbytes}")
    raw = torch.frombuffer(bytearray(array.data) if array.data.readonly else array.data, dtype=torch.uint8)
    if array.dtype == "q8":
        return _dequantize(raw, *array.shape)
    return raw.view(getattr(torch, array.dtype)).view(array.shape)


def check_finite(tensor: torch.Tensor) -> None:
    """Raises `ServerFault` when a value of `tensor` is NaN or infinite."""
    finite = tensor.isfinite()
    if not bool(finite.all()):
        count = finite.numel() - int(finite.sum())
        raise ServerFault(f"{count} of {finite.numel()} hidden states are NaN or infinite: the server that computed them is at fault")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().numpy().data


def _quantize(tensor: torch.Tensor) -> torch.Tensor:
    """Codes and scales in one uint8 tensor; blocks with a largest magnitude, after bitsandbytes (Dettmers et al., 2022)."""
    import torch

    rows, values = tensor.shape
    blocks = math.ceil(values / Q8_BLOCK)
    padded = torch.nn.functional.pad(tensor.to("cpu", torch.float32), (0, blocks * Q8_BLOCK - values)).view(rows, blocks, Q8_BLOCK)
    scales = padded.abs().amax(dim=2) / 127  # of a block with a NaN or an infinity: not finite, and so is what comes out of it
    divisors = torch.where(scales == 0, 1.0, scales)[:, :, None]
    codes = (padded / divisors).nan_to_num(1.0).round().clamp(-127, 127).to(torch.int8).view(rows, -1)[:, :values]
    return torch.cat((codes.reshape(-1).view(torch.uint8), scales.view(-1).view(torch.uint8)))


def _dequantize(raw: torch.Tensor, rows: int, values: int) -> torch.Tensor:
    import torch

    codes = raw[: rows * values].view(torch.int8).view(rows, values)
    scales = raw[rows * values :].clone().view(torch.float32).view(rows, -1)  # cloned: float32 has to be aligned
    return codes * scales.repeat_interleave(Q8_BLOCK, dim=1)[:, :values]


# The messages of `corolla.types`, there and back.


def to_message(frame: Request) -> Message:
    """What an engine receives. Raises `InvalidSetting` for settings outside their ranges."""
    if isinstance(frame, CancelFrame):
        return Cancel(frame.session, frame.generation)
    if isinstance(frame, CloseFrame):
        return Close(frame.session)
    return to_step(frame)


def from_message(message: Cancel | Close) -> CancelFrame | CloseFrame:
    """A step needs to know its way: see `from_step`."""
    if isinstance(message, Cancel):
        return CancelFrame(message.session, message.generation)
    return CloseFrame(message.session)


def to_step(frame: StepFrame) -> Step:
    """The step, with hidden states as its payload where it has them. Raises `InvalidSetting` like `to_settings`."""
    settings = None if frame.settings is None else to_settings(frame.settings)
    if frame.hidden is None:
        return Step(frame.session, frame.start, frame.tokens, frame.generation, settings, frame.adapter)
    return Step(frame.session, frame.start, from_array(frame.hidden), frame.generation, settings, frame.adapter, frame.tokens)


def from_step(
    step: Step,
    *,
    wire_dtype: WireDtype = "bfloat16",
    route: tuple[Hop, ...] = (),
    hop: int = 0,
    client: str = "",
    timings: tuple[HopTiming, ...] = (),
) -> StepFrame:
    """A step on its way to `route[hop]`.

    Raises `InvalidSetting` for a setting that does not fit 64 bits, `ServerFault` like `to_array`, and `ValueError` for more
    than `MAX_STEP_TOKENS` tokens, or tokens and rows that differ in number.
    """
    hidden = None
    if isinstance(step.payload, Sequence):
        tokens = step.payload
    else:
        hidden, tokens = to_array(step.payload, wire_dtype), step.tokens
    settings = None if step.settings is None else from_settings(step.settings)
    return StepFrame(step.session, step.generation, step.start, tuple(tokens), hidden, settings, route, hop, client, step.adapter, timings)


def to_settings(frame: SettingsFrame) -> GenerationSettings:
    """Raises `InvalidSetting` for a value outside its range."""
    return GenerationSettings(**{name: getattr(frame, name) for name in frame.__struct_fields__})


def from_settings(settings: GenerationSettings) -> SettingsFrame:
    """Raises `InvalidSetting` for a number that does not fit 64 bits."""
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    for name, value in given.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise InvalidSetting(name, f"{number} does not fit 64 bits")
    return SettingsFrame(**{field.name: given[field.name] for field in fields(settings) if given[field.name] != field.default})


def to_reply(frame: Answer) -> Reply:
    """What a session receives. Raises `ProtocolError` like `from_array`."""
    if isinstance(frame, TokenFrame):
        return Token(frame.session, frame.generation, frame.position, frame.token_id, frame.logprob, frame.top_logprobs, frame.finish)
    if isinstance(frame, HiddenFrame):
        return Hidden(frame.session, frame.generation, frame.start, from_array(frame.hidden))
    if isinstance(frame, CachedFrame):
        return Cached(frame.session, frame.generation, frame.position)
    if isinstance(frame, GapFrame):
        return Gap(frame.session, frame.generation, frame.have)
    return Failed(frame.session, frame.generation, error_of(frame))


def from_reply(reply: Reply, *, peer: str = "", wire_dtype: WireDtype = "bfloat16", timings: tuple[HopTiming, ...] = ()) -> Answer:
    """A reply on its way from the server `peer`. Raises `ServerFault` like `to_array`."""
    session, generation = reply.session, reply.generation
    if isinstance(reply, Token):
        return TokenFrame(session, generation, reply.position, reply.token_id, reply.logprob, reply.top_logprobs, reply.finish, timings)
    if isinstance(reply, Hidden):
        return HiddenFrame(session, generation, reply.start, to_array(reply.hidden, wire_dtype))
    if isinstance(reply, Cached):
        return CachedFrame(session, generation, reply.position)
    if isinstance(reply, Gap):
        return GapFrame(session, generation, reply.have, peer)
    return failed_of(reply.error, session, generation, peer=peer)


# Errors: rebuilt by class, without `__init__`, whose arguments differ from class to class.

_ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, CorollaError) and value is not CorollaError
}
_DETAILS: dict[type[CorollaError], dict[str, int | str]] = {InvalidSetting: {"setting": ""}, PromptTooLong: {"tokens": 0, "limit": 0}}
_RETRY_AFTER = 1.0  # seconds, where a full server does not say


def error_of(frame: FailedFrame) -> CorollaError:
    """The typed error; one of a kind that this version does not know is a `ServerFault`."""
    kind = _ERRORS.get(frame.kind, ServerFault)
    error = kind.__new__(kind, frame.message)
    if isinstance(error, CapacityError):
        error.retry_after = _RETRY_AFTER if frame.retry_after is None else frame.retry_after
    for name, default in _DETAILS.get(kind, {}).items():
        value = frame.details.get(name)
        setattr(error, name, value if type(value) is type(default) else default)
    return error


def failed_of(error: CorollaError, session: str, generation: int, *, peer: str = "") -> FailedFrame:
    """`error` as the answer to a step of `session` at the server `peer`; a very long sentence is cut."""
    kind = type(error)
    return FailedFrame(
        session,
        generation,
        kind.__name__,
        str(error)[:_MAX_TEXT],
        retry_after=error.retry_after if isinstance(error, CapacityError) else None,
        peer=peer,
        details={name: getattr(error, name) for name in _DETAILS.get(kind, {})},
    )
