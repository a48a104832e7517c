"""The messages of `corolla.types` as those that travel, there and back; typed errors among them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields

from corolla import errors
from corolla.errors import CapacityError, CorollaError, InvalidSetting, PromptTooLong, ServerFault
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.wire import (
    MAX_TEXT,
    AdapterFrame,
    Answer,
    BackwardFrame,
    CachedFrame,
    CancelFrame,
    CloseFrame,
    FailedFrame,
    ForwardFrame,
    GapFrame,
    HiddenFrame,
    Hop,
    ProductFrame,
    PromptFrame,
    PromptNameFrame,
    Request,
    ScoresFrame,
    SettingsFrame,
    StepFrame,
    TimingFrame,
    TokenFrame,
    WireDtype,
)
from corolla.types import (
    AdapterPart,
    Cached,
    Call,
    Cancel,
    Close,
    Factors,
    Failed,
    Gap,
    GenerationSettings,
    Hidden,
    HopTiming,
    Message,
    PromptName,
    PromptPart,
    Reply,
    Score,
    Scores,
    Span,
    Step,
    Token,
)


def to_message(frame: Request) -> Message:
    """What an engine receives. Raises `InvalidSetting` for settings outside their ranges."""
    if isinstance(frame, CancelFrame):
        return Cancel(frame.session, frame.generation)
    if isinstance(frame, CloseFrame):
        return Close(frame.session, frame.generation)
    return to_step(frame)


def from_message(message: Cancel | Close) -> CancelFrame | CloseFrame:
    """A step needs to know its way: see `from_step`."""
    if isinstance(message, Cancel):
        return CancelFrame(message.session, message.generation)
    return CloseFrame(message.session, message.generation)


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
        prompt=to_prompt_name(frame.prompt),
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
        from_timings(timings),
        asked=step.asked if route else 0,
        more=step.more,
        timed=timed,
        output="hidden" if step.wants_hidden else "token",
        prompt=from_prompt_name(step.prompt) if route else None,
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
        prompt=to_prompt_name(frame.prompt),
        keep=isinstance(frame, ForwardFrame) and frame.keep,
        kept=frame.kept if isinstance(frame, BackwardFrame) else 0,
    )


def to_prompt_name(frame: PromptNameFrame | None) -> PromptName | None:
    return None if frame is None else PromptName(frame.name, frame.tokens, frame.deep)


def from_prompt_name(name: PromptName | None) -> PromptNameFrame | None:
    return None if name is None else PromptNameFrame(name.name, name.tokens, name.deep)


def to_prompt_part(frame: PromptFrame) -> PromptPart:
    """Raises `ProtocolError` like `from_array`."""
    rows, tokens = from_array(frame.hidden), frame.name.tokens
    deep = rows[tokens if frame.has_input else 0 :].unflatten(0, (-1, tokens)) if frame.name.deep else None
    name = PromptName(frame.name.name, tokens, frame.name.deep)
    return PromptPart(name, Span(frame.start, frame.end), rows[:tokens] if frame.has_input else None, deep)


def from_prompt_part(part: PromptPart) -> PromptFrame:
    """A prompt, or the part of it that its span needs, on its way to a server."""
    import torch

    rows = [piece.flatten(0, -2) for piece in (part.input, part.deep) if piece is not None]
    name = PromptNameFrame(part.name.name, part.name.tokens, part.name.deep)
    return PromptFrame(name, part.span.start, part.span.end, to_array(torch.cat(rows), "float32"), has_input=part.input is not None)


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


def from_timings(timings: tuple[HopTiming, ...]) -> tuple[TimingFrame, ...]:
    return tuple(TimingFrame(each.peer, each.queue, each.compute, each.transfer) for each in timings)


def to_timings(frames: tuple[TimingFrame, ...]) -> tuple[HopTiming, ...]:
    return tuple(HopTiming(each.peer, each.queue_s, each.compute_s, each.transfer_s) for each in frames)


def to_settings(frame: SettingsFrame) -> GenerationSettings:
    """Raises `InvalidSetting` for a value outside its range."""
    return GenerationSettings(**{name: getattr(frame, name) for name in frame.__struct_fields__})


def from_settings(settings: GenerationSettings) -> SettingsFrame:
    travelling = {field.name: field.default for field in fields(settings) if field.name in SettingsFrame.__struct_fields__}
    return SettingsFrame(**{name: getattr(settings, name) for name, default in travelling.items() if getattr(settings, name) != default})


def to_reply(frame: Answer) -> Reply:
    """What a session receives. Raises `ProtocolError` like `from_array`."""
    if isinstance(frame, TokenFrame):
        return Token(
            frame.session,
            frame.generation,
            frame.position,
            frame.token_id,
            frame.logprob,
            frame.top_logprobs,
            frame.finish,
            to_timings(frame.timings),
        )
    if isinstance(frame, ScoresFrame):
        return Scores(frame.session, frame.generation, frame.start, tuple(Score(*score) for score in frame.scores))
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
        return TokenFrame(
            session,
            generation,
            reply.position,
            reply.token_id,
            reply.logprob,
            reply.top_logprobs,
            reply.finish,
            from_timings(timings or reply.timings),
        )
    if isinstance(reply, Scores):
        return ScoresFrame(session, generation, reply.start, tuple((score.logprob, score.top_logprobs) for score in reply.scores))
    if isinstance(reply, Hidden):
        return HiddenFrame(session, generation, reply.start, to_array(reply.hidden, wire_dtype), from_timings(timings))
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
