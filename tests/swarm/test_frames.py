from __future__ import annotations

import asyncio
import struct
import tracemalloc
from typing import get_args

import msgspec
import pytest

from corolla.errors import CallerError, NetworkError, ProtocolError
from corolla.messages import Array, HiddenFrame, Ping, SettingsFrame, StepFrame, Unknown, WireMessage
from corolla.swarm import frames
from corolla.swarm.frames import decode, encode, read_body, read_length
from tests.swarm.fuzz_frames import MESSAGES, array, frame_of, fuzz

FUZZED = 20_000
LIMIT = 1 << 20
MEBIBYTE = 1 << 20


def framed(header: bytes, body: bytes = b"", major: int = frames.MAJOR, minor: int = frames.MINOR) -> bytes:
    return struct.pack("<BBH", major, minor, len(header)) + header + body


def packed(**values: object) -> bytes:
    return msgspec.msgpack.encode(values)


async def next_frame(reader: asyncio.StreamReader, limit: int = LIMIT) -> memoryview | None:
    length = await read_length(reader, limit)
    return None if length is None else await read_body(reader, length, lambda _: None)


def read(data: bytes, limit: int = LIMIT) -> memoryview | None:
    async def run() -> memoryview | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await next_frame(reader, limit)

    return asyncio.run(run())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back(message: WireMessage) -> None:
    frame = read(b"".join(encode(message)))
    assert frame is not None
    assert decode(frame) == message


def test_every_kind_of_message_is_tried() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(WireMessage))


def test_a_tensor_is_neither_copied_to_be_sent_nor_when_it_came() -> None:
    message = HiddenFrame("s", 0, 0, array("float32", 2, 3))
    assert encode(message)[1] is message.hidden.data
    frame = frame_of(message)
    decoded = decode(frame)
    assert isinstance(decoded, HiddenFrame)
    assert decoded.hidden.data.obj is frame


def test_a_decode_step_costs_little_more_than_its_hidden_states() -> None:
    message = StepFrame("c0ffee" * 5 + "42", 3, 1000, (4711,), array("bfloat16", 1, 576), SettingsFrame())
    assert len(frame_of(message)) <= 1.1 * 576 * 2


def test_frames_follow_one_another_on_a_stream() -> None:
    async def run() -> None:
        reader = asyncio.StreamReader()
        for message in MESSAGES:
            reader.feed_data(b"".join(encode(message)))
        reader.feed_eof()
        for message in MESSAGES:
            frame = await next_frame(reader)
            assert frame is not None
            assert decode(frame) == message
        assert await next_frame(reader) is None

    asyncio.run(run())


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 10, -1])
def test_a_stream_that_ends_within_a_frame(cut: int) -> None:
    with pytest.raises(NetworkError, match="ended within a frame"):
        read(b"".join(encode(MESSAGES[1]))[:cut])


@pytest.mark.parametrize("length", [0, 3, LIMIT + 1, 2**32 - 1])
def test_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"{length} bytes"):
        read(struct.pack("<I", length) + b"some")


@pytest.mark.parametrize("cut", range(len(frame_of(MESSAGES[1]))))
def test_a_frame_cut_short(cut: int) -> None:
    with pytest.raises(ProtocolError):
        decode(frame_of(MESSAGES[1])[:cut])


def test_more_tensor_than_promised() -> None:
    for message in MESSAGES:
        with pytest.raises(ProtocolError, match="promises"):
            decode(frame_of(message) + b"\0")


def test_another_major_version_names_both() -> None:
    with pytest.raises(ProtocolError, match=rf"version {frames.MAJOR + 1}\.4 and ours of {frames.MAJOR}\.{frames.MINOR}"):
        decode(framed(packed(t="ping", nonce=1), major=frames.MAJOR + 1, minor=4))


def test_fields_of_a_later_minor_version_are_ignored() -> None:
    header = packed(t="ping", later={"deep": [1, 2.5, None]}, nonce=1)
    assert decode(framed(header, minor=frames.MINOR + 1)) == Ping(1)


def test_a_kind_of_a_later_minor_version_is_unknown() -> None:
    assert decode(framed(packed(t="later", nonce="what"), b"tensor", minor=frames.MINOR + 1)) == Unknown("later")


HEADERS = {
    "nothing": b"",
    "no kind": packed(nonce=1),
    "a list": msgspec.msgpack.encode([1, 2]),
    "a kind that is a number": packed(t=1),
    "a kind without a name": packed(t=""),
    "a very long kind": packed(t="x" * 300),
    "a field is missing": packed(t="ping"),
    "more than int64": packed(t="ping", nonce=2**63),
    "less than nothing": packed(t="ping", nonce=-1),
    "a fraction": packed(t="ping", nonce=1.5),
    "no UTF-8": b"\x82\xa1t\xa5close\xa1s\xa2\xff\xfe",
    "nested": b"\x83\xa1t\xa4ping\xa5nonce\x01\xa1x" + b"\x91" * 60_000,
    "twice": packed(t="ping", nonce=1) * 2,
    "long name": packed(t="close", s="x" * 257),
    "no wait": packed(t="failed", s="s", g=0, kind="Busy", message="", retry_after=float("nan")),
    "no probability": packed(t="token", s="s", g=0, p=0, k=0, l=float("nan")),
    "no dtype": packed(t="hidden", s="s", g=0, b=0, h={"d": "float64", "z": [1, 1]}),
    "no rows": packed(t="hidden", s="s", g=0, b=0, h={"d": "float32", "z": [0, 1]}),
    "three sizes": packed(t="hidden", s="s", g=0, b=0, h={"d": "float32", "z": [1, 1, 1]}),
    "rows without tokens": packed(t="step", s="s", g=0, b=0, k=[1], h={"d": "float32", "z": [2, 1]}),
    "outside the route": packed(t="step", s="s", g=0, b=0, k=[1], r=[{"w": "a", "b": 0, "e": 1}], i=1),
    "a route with a hole": packed(t="step", s="s", g=0, b=0, k=[1], r=[{"w": "a", "b": 0, "e": 1}, {"w": "b", "b": 2, "e": 3}]),
    "a span of nothing": packed(t="step", s="s", g=0, b=0, k=[1], r=[{"w": "a", "b": 1, "e": 1}]),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_bad_header_is_a_protocol_error(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(framed(header))


def claim(tail: bytes, **values: object) -> bytes:
    """A header of `values` and one more field."""
    return bytes((0x80 | len(values) + 1,)) + packed(**values)[1:] + tail


# Lists, texts and bytes that claim 4 GiB, in every place that takes one.
CLAIMS = {
    "tokens": claim(b"\xa1k\xdd\xff\xff\xff\xff", t="step", s="s", g=0, b=0),
    "route": claim(b"\xa1r\xdd\xff\xff\xff\xff", t="step", s="s", g=0, b=0, k=[1]),
    "timings": claim(b"\xa1m\xdd\xff\xff\xff\xff", t="step", s="s", g=0, b=0, k=[1]),
    "end tokens": claim(b"\xa1o\x81\xaestop_token_ids\xdd\xff\xff\xff\xff", t="step", s="s", g=0, b=0, k=[1]),
    "alternatives": claim(b"\xa1n\xdd\xff\xff\xff\xff", t="token", s="s", g=0, p=0, k=0, l=-1.0),
    "details": claim(b"\xa7details\xdf\xff\xff\xff\xff", t="failed", s="s", g=0, kind="Busy", message=""),
    "a text": claim(b"\xa1s\xdb\xff\xff\xff\xff", t="close"),
    "bytes": claim(b"\xa1h\x81\xa4data\xc6\xff\xff\xff\xff", t="hidden", s="s", g=0, b=0),
    "an unknown field": claim(b"\xa1y\xdd\xff\xff\xff\xff", t="ping", nonce=1),
    "a tensor": claim(b"\xa1h" + packed(d="float32", z=[8192, 2**20]), t="hidden", s="s", g=0, b=0),
}


@pytest.mark.parametrize("header", CLAIMS.values(), ids=CLAIMS.keys())
def test_what_is_only_claimed_is_not_allocated(header: bytes) -> None:
    frame = framed(header)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(frame)
        assert tracemalloc.get_traced_memory()[1] < MEBIBYTE
    finally:
        tracemalloc.stop()


def test_a_claimed_frame_is_not_allocated() -> None:
    limit = 1 << 31

    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(struct.pack("<I", limit) + b"little")
        reader.feed_eof()
        tracemalloc.start()
        try:
            with pytest.raises(NetworkError):
                await next_frame(reader, limit)
            assert tracemalloc.get_traced_memory()[1] < MEBIBYTE
        finally:
            tracemalloc.stop()

    asyncio.run(run())


def test_every_piece_is_told_and_may_be_refused() -> None:
    async def run(most: int) -> list[int]:
        reader, told = asyncio.StreamReader(), []

        def arrived(count: int) -> None:
            told.append(count)
            if sum(told) > most:
                raise NetworkError("too much")

        body = asyncio.create_task(read_body(reader, 300, arrived))
        for _ in range(3):
            reader.feed_data(bytes(100))
            await asyncio.sleep(0)
        assert len(await body) == 300
        return told

    assert asyncio.run(run(300)) == [100, 100, 100]
    with pytest.raises(NetworkError, match="too much"):
        asyncio.run(run(150))


def test_what_no_frame_holds_is_the_callers_fault() -> None:
    with pytest.raises(CallerError, match="fewer tokens"):
        encode(StepFrame("s", 0, 0, tuple(range(2**40, 2**40 + 8192))))
    with pytest.raises(CallerError, match="cannot be sent"):
        encode(StepFrame("\ud800", 0, 0, ()))
    with pytest.raises(CallerError, match="cannot be sent"):
        encode(Ping(2**64))


def test_a_description_without_its_bytes_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="has 0 bytes, not 24"):
        encode(HiddenFrame("s", 0, 0, Array("float32", (2, 3))))


def test_damaged_frames_only_raise_protocol_errors() -> None:
    outcomes = fuzz(FUZZED)
    assert outcomes.total() == FUZZED
    assert {"refused", "unknown", "valid"} <= outcomes.keys()
