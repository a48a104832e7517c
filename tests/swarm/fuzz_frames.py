"""Random, damaged and bit-flipped frames: `python -m tests.swarm.fuzz_frames [COUNT] [SEED]`.

A frame decodes to a message that every later stage can handle, or raises `ProtocolError`; nothing else may happen.
"""

from __future__ import annotations

import random
import sys
from collections import Counter as Tally
from collections.abc import Iterator

from corolla import messages
from corolla.errors import CorollaError, ProtocolError
from corolla.messages import (
    AdapterFrame,
    Array,
    Ask,
    AskCounters,
    BackwardFrame,
    Cached,
    Cancel,
    Close,
    Counters,
    FailedFrame,
    ForwardFrame,
    Gap,
    HiddenFrame,
    Hop,
    HopTiming,
    Leaving,
    Ping,
    Pong,
    ProductFrame,
    PromptFrame,
    Refused,
    ResultFrame,
    Score,
    Scores,
    SettingsFrame,
    StepFrame,
    Token,
    Unknown,
    Whereabouts,
    WireMessage,
)
from corolla.swarm import convert, frames
from corolla.swarm.arrays import from_array
from corolla.types import FinishReason, PromptName


def array(dtype: messages.WireDtype, rows: int, values: int) -> Array:
    size = Array(dtype, (rows, values)).nbytes
    return Array(dtype, (rows, values), memoryview(bytes(index % 251 for index in range(size))))


ROUTE = (Hop("first", 0, 4), Hop("second", 4, 9), Hop("third", 9, 24))
MESSAGES: tuple[WireMessage, ...] = (
    StepFrame("session", 1, 7, (5, 6, 7)),
    StepFrame("session", 1, 7, (5, 6, 7), array("bfloat16", 3, 6), drafts=2),
    StepFrame("session", 2, 0, (5, 6), array("bfloat16", 2, 6), SettingsFrame(seed=3, stop_token_ids=(7,)), ROUTE, 1, "client", "a"),
    StepFrame("session", 2, 0, (5,), array("q8", 1, 70), SettingsFrame(stop_token_ids=(2, 3)), ROUTE, 2, "client"),
    StepFrame("session", 2, 0, (0, 0, 5), route=ROUTE, client="client", prompt=PromptName("f00d", 2, True)),
    PromptFrame(PromptName("f00d", 2, True), 0, 2, array("float32", 6, 4), has_input=True),
    AdapterFrame(
        "f00d", (bytes(32), bytes(range(32))), 1, (ProductFrame("qkv", 2, 3, 4), ProductFrame("out", 1, 4, 3)), array("float32", 3, 8)
    ),
    Cancel("session", 3),
    Scores("session", 3, 1, (Score(-0.5, ((7, -0.5), (8, -1.5))), Score(-2.0))),
    Close("session"),
    Close("session", 4),
    Ask("session", 4),
    Whereabouts("session", 4, 17, 3),
    Token("session", 1, 9, 42, -0.5, ((42, -0.5), (7, -1.25)), FinishReason.STOP, (HopTiming("first", 0.1, 0.2, 0.3),)),
    HiddenFrame("session", 1, 4, array("float32", 2, 3)),
    HiddenFrame("session", 1, 4, array("float16", 3, 2)),
    Cached("session", 1, 12),
    Gap("session", 1, 3),
    FailedFrame("session", 1, "Busy", "all places are taken", 0.5, "second"),
    FailedFrame("session", 1, "InvalidSetting", "top_p: no", None, "second", {"setting": "top_p"}),
    ForwardFrame(7, 2, 4, (3, 2), array("bfloat16", 5, 4)),
    BackwardFrame(8, 2, 4, (3, 2), array("float32", 10, 4)),
    ForwardFrame(9, 2, 4, (3, 2), array("bfloat16", 5, 4), prompt=PromptName("f00d", 2, True), keep=True),
    BackwardFrame(10, 2, 4, (3, 2), array("float32", 5, 4), prompt=PromptName("f00d", 2, True), kept=9),
    ResultFrame(7, array("float16", 5, 4), (HopTiming("first", 0.1, 0.2, 0.3),)),
    Leaving(),
    AskCounters(),
    Counters({"pushes": 7}),
    Ping(1),
    Pong(2**63 - 1),
    Refused("later"),
)


def frame_of(message: WireMessage) -> bytes:
    """A frame as `read_body` gives it."""
    return b"".join(frames.encode(message))[frames.LENGTH.size :]


def damaged(frame: bytes, chance: random.Random) -> bytes:
    """`frame` with flipped bits, bytes replaced, cut, doubled or inserted."""
    buffer = bytearray(frame)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        where = chance.randrange(len(buffer) or 1)
        match chance.randrange(8):
            case 0 | 1 | 2 if buffer:
                buffer[where] ^= 1 << chance.randrange(8)
            case 3 | 4 if buffer:
                buffer[where] = chance.choice((0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xC6, 0xC9, 0xCA, 0xCB, 0xCF, 0xD3, 0xDB, 0xDD, 0xDF, 0xFF))
            case 5:
                del buffer[where:]
            case 6:
                buffer[where:where] = chance.randbytes(chance.randrange(1, 9))
            case _:
                buffer[where:where] = buffer[where : where + chance.randrange(1, 40)]
    return bytes(buffer)


def inputs(count: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    corpus = [frame_of(message) for message in MESSAGES]
    for _ in range(count):
        match chance.randrange(10):
            case 0:
                yield chance.randbytes(chance.randrange(64))
            case 1:  # a plausible beginning, so that the bytes reach the header's decoder
                header = chance.randbytes(chance.randrange(64))
                yield bytes((frames.MAJOR, 0, len(header), 0)) + header
            case _:
                yield damaged(chance.choice(corpus), chance)


def handle(frame: bytes) -> str:
    """What became of `frame`, taken as far as a server and a client take it."""
    try:
        message = frames.decode(frame)
    except ProtocolError:
        return "refused"
    if isinstance(message, Unknown):
        frames.encode(Refused(message.kind))
        return "unknown"
    frames.encode(message)
    try:
        if isinstance(message, StepFrame):
            convert.to_step(message)
        elif isinstance(message, PromptFrame):
            convert.to_prompt_part(message)
        elif isinstance(message, AdapterFrame):
            convert.to_adapter_part(message)
        elif isinstance(message, ForwardFrame | BackwardFrame | ResultFrame | HiddenFrame):
            from_array(message.hidden)
        elif isinstance(message, FailedFrame):
            convert.error_of(message)
    except CorollaError:
        return "invalid"
    return "valid"


def fuzz(count: int, seed: int = 0) -> Tally[str]:
    """How many frames ended how; any exception but a `ProtocolError` comes out, with the frame in a note."""
    outcomes: Tally[str] = Tally()
    for frame in inputs(count, seed):
        try:
            outcomes[handle(frame)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}, frame {frame.hex()}")
            raise
    return outcomes


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    for outcome, number in fuzz(*(arguments or [20_000])).most_common():
        print(f"{outcome:8} {number}")
