"""What an engine speaks in tensors and exceptions, as it travels in `corolla.messages`, there and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields

from corolla import errors
from corolla.errors import CapacityError, CorollaError, InvalidSetting, PromptTooLong, ServerFault
from corolla.messages import (
    MAX_TEXT,
    AdapterFrame,
    BackwardFrame,
    FailedFrame,
    ForwardFrame,
    HiddenFrame,
    Hop,
    HopTiming,
    ProductFrame,
    PromptFrame,
    SettingsFrame,
    StepFrame,
    WireDtype,
)
from corolla.swarm.arrays import from_array, to_array
from corolla.types import AdapterPart, Call, Factors, GenerationSettings, Hidden, PromptPart, Span, Step


def to_step(frame: StepFrame) -> Step:
    """The step, with hidden states as its payload where it has them. Raises `InvalidSetting` like `to_settings`."""
    return Step(
        frame.session,
        frame.start,
        frame.tokens if frame.hidden is None else from_array(frame.hidden),
        frame.generation,
        None if frame.settings is None else to_settings(frame.settings),
        frame.adapter,
        tokens=() if frame.hidden is None else frame.tokens,
        asked=frame.asked,
        more=frame.more,
        wants_hidden=frame.output == "hidden",
        prompt=frame.prompt,
        drafts=frame.drafts,
        began=frame.began,
    )


def from_step(
    step: Step,
    *,
    wire_dtype: WireDtype = "bfloat16",
    route: tuple[Hop, ...] = (),
    hop: int = 0,
    client: str = "",
    timed: bool = False,
    timings: tuple[HopTiming, ...] = (),
) -> StepFrame:
    """A step on its way to `route[hop]`; without a route, to a server that remembers what came with it.

    Raises `ServerFault` like `to_array`, and `ValueError` for more than `MAX_STEP_TOKENS` tokens, or tokens and rows that differ in number.
    """
    hidden = None
    if isinstance(step.payload, Sequence):
        tokens = step.payload
    else:
        hidden, tokens = to_array(step.payload, wire_dtype), step.tokens
    settings = None if step.settings is None else from_settings(step.settings)
    return StepFrame(
        step.session,
        step.generation,
        step.start,
        tuple(tokens),
        hidden,
        settings,
        route,
        hop,
        client,
        step.adapter,
        timings,
        asked=step.asked if route else 0,
        more=step.more,
        timed=timed,
        output="hidden" if step.wants_hidden else "token",
        prompt=step.prompt if route else None,
        drafts=step.drafts,
        began=step.began if route and step.began != step.start else None,
    )


def to_call(frame: ForwardFrame | BackwardFrame, client: str) -> Call:
    """What the frame of `client` asks for."""
    return Call(
        client=client,
        number=frame.call,
        span=Span(frame.start, frame.end),
        lengths=frame.lengths,
        back=isinstance(frame, BackwardFrame),
        prompt=frame.prompt,
        keep=isinstance(frame, ForwardFrame) and frame.keep,
        kept=frame.kept if isinstance(frame, BackwardFrame) else 0,
    )


def to_prompt_part(frame: PromptFrame) -> PromptPart:
    """Raises `ProtocolError` like `from_array`."""
    rows, tokens = from_array(frame.hidden), frame.name.tokens
    deep = rows[tokens if frame.has_input else 0 :].unflatten(0, (-1, tokens)) if frame.name.deep else None
    return PromptPart(frame.name, Span(frame.start, frame.end), rows[:tokens] if frame.has_input else None, deep)


def from_prompt_part(part: PromptPart) -> PromptFrame:
    """A prompt, or the part of it that its span needs, on its way to a server."""
    import torch

    rows = [piece.flatten(0, -2) for piece in (part.input, part.deep) if piece is not None]
    return PromptFrame(part.name, part.span.start, part.span.end, to_array(torch.cat(rows), "float32"), has_input=part.input is not None)


_ADAPTER_ROW = 1024  # values


def from_adapter_part(part: AdapterPart) -> Iterator[AdapterFrame]:
    """An adapter, or the part of it that its span needs, on its way to a server: a frame for each block."""
    import torch

    for index, block in zip(range(part.span.start, part.span.end), part.blocks, strict=True):
        products = tuple(ProductFrame(name, len(a), a.shape[1], len(b)) for name, (a, b) in block.items())
        values = [factor.flatten() for factors in block.values() for factor in factors]
        count = sum(map(len, values))
        rows = max(1, math.ceil(count / _ADAPTER_ROW))
        flat = torch.cat([*values, torch.zeros(rows * _ADAPTER_ROW - count)])
        yield AdapterFrame(part.digest, part.digests, index, products, to_array(flat.view(rows, _ADAPTER_ROW), "float32"))


def to_adapter_part(frame: AdapterFrame) -> AdapterPart:
    """Raises `ProtocolError` like `from_array`."""
    values, at, block = from_array(frame.hidden).flatten(), 0, {}
    for product in frame.products:
        a, b = values[at : at + product.values].split([product.rank * product.inputs, product.rank * product.outputs])
        block[product.product] = Factors(a.view(product.rank, product.inputs), b.view(product.outputs, product.rank))
        at += product.values
    return AdapterPart(frame.digest, Span(frame.block, frame.block + 1), (block,), frame.digests)


def to_settings(frame: SettingsFrame) -> GenerationSettings:
    """Raises `InvalidSetting` for a value outside its range."""
    return GenerationSettings(**{name: getattr(frame, name) for name in frame.__struct_fields__})


def from_settings(settings: GenerationSettings) -> SettingsFrame:
    travelling = {field.name: field.default for field in fields(settings) if field.name in SettingsFrame.__struct_fields__}
    return SettingsFrame(**{name: getattr(settings, name) for name, default in travelling.items() if getattr(settings, name) != default})


def from_hidden(reply: Hidden, wire_dtype: WireDtype, timings: tuple[HopTiming, ...] = ()) -> HiddenFrame:
    """Hidden states on their way to the client. Raises `ServerFault` like `to_array`."""
    return HiddenFrame(reply.session, reply.generation, reply.start, to_array(reply.hidden, wire_dtype), timings)


# Errors: rebuilt by class, without `__init__`, whose arguments differ from class to class.

_ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, CorollaError) and value is not CorollaError
}
_DETAILS: dict[type[CorollaError], dict[str, int | str]] = {InvalidSetting: {"setting": ""}, PromptTooLong: {"tokens": 0, "limit": 0}}
_LARGEST = 2**63 - 1
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
    """`error` as the answer to a step of `session` at the server `peer`; a very long sentence is cut, and a number to 64 bits."""
    kind = type(error)
    details = {name: getattr(error, name) for name in _DETAILS.get(kind, {})}
    return FailedFrame(
        session,
        generation,
        kind.__name__,
        str(error)[:MAX_TEXT],
        retry_after=error.retry_after if isinstance(error, CapacityError) else None,
        peer=peer,
        details={name: min(value, _LARGEST) if isinstance(value, int) else value for name, value in details.items()},
    )
