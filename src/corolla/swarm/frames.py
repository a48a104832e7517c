"""Messages as bytes on a stream.

    u32 length | u8 major | u8 minor | u16 header length | header (msgpack) | tensor bytes (raw, little endian)

Integers are little endian; the length counts what comes after it. The header is a struct of `corolla.messages`; the tensor's
bytes are as many as its dtype and shape ask for. Another major version is refused. A later minor one is understood as far
as possible: unknown fields are ignored, a message of an unknown kind is `Unknown`, to be answered with `Refused`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Annotated, get_args

import msgspec

from corolla.errors import CallerError, NetworkError, ProtocolError
from corolla.messages import (
    AdapterFrame,
    Array,
    BackwardFrame,
    ForwardFrame,
    HiddenFrame,
    Name,
    PromptFrame,
    ResultFrame,
    StepFrame,
    Unknown,
    WireMessage,
)

MAJOR = 3
MINOR = 0
MAX_HEADER = 2**16 - 1  # bytes

LENGTH = struct.Struct("<I")  # what stands before every frame
_PREFIX = struct.Struct("<BBH")
_MAX_LENGTH = 2**32 - 1
_EXCERPT = 200  # characters of what a decoder says about a peer's bytes


class _AnyKind(msgspec.Struct):
    t: Annotated[Name, msgspec.Meta(min_length=1)]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(WireMessage)
_KIND_DECODER = msgspec.msgpack.Decoder(_AnyKind)
_WITH_TENSOR = (StepFrame, HiddenFrame, PromptFrame, AdapterFrame, ForwardFrame, BackwardFrame, ResultFrame)
_KINDS = frozenset(kind.__struct_config__.tag for kind in get_args(WireMessage))


def encode(message: WireMessage) -> list[bytes | memoryview]:
    """The buffers to write, in order: the header, and the tensor itself where there is one, uncopied.

    Raises `CallerError` for a message that no frame holds, and `ValueError` when its tensor's bytes do not fit its shape.
    """
    array = _array_of(message)
    if array is not None:
        if array.data.nbytes != array.nbytes:
            raise ValueError(f"an array of shape {array.shape} in {array.dtype} has {array.data.nbytes} bytes, not {array.nbytes}")
        described = Array(array.dtype, array.shape)
        message = msgspec.structs.replace(message, hidden=described)
    try:
        header = _ENCODER.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise CallerError(f"a number or a text in the message cannot be sent: {error}") from error
    if len(header) > MAX_HEADER:
        raise CallerError(f"the message's header takes {len(header)} bytes and a frame holds {MAX_HEADER}: send fewer tokens at once")
    length = _PREFIX.size + len(header) + (0 if array is None else array.nbytes)
    if length > _MAX_LENGTH:
        raise CallerError(f"the message takes {length} bytes and a frame holds {_MAX_LENGTH}: send fewer tokens at once")
    head = b"".join((LENGTH.pack(length), _PREFIX.pack(MAJOR, MINOR, len(header)), header))
    return [head] if array is None else [head, array.data]


def decode(frame: bytes | memoryview) -> WireMessage | Unknown:
    """The message in a frame as `read_body` gives it: without its length. Its tensor's `data` is a view into `frame`.

    Raises `ProtocolError` for anything else than a frame of this major version.
    """
    view = memoryview(frame)
    if len(view) < _PREFIX.size:
        raise ProtocolError(f"a frame of {len(view)} bytes is too short to be one")
    major, minor, header_length = _PREFIX.unpack_from(view)
    if major != MAJOR:
        raise ProtocolError(f"the peer's frames are of version {major}.{minor} and ours of {MAJOR}.{MINOR}: install one version on both")
    body = _PREFIX.size + header_length
    if len(view) < body:
        raise ProtocolError(f"a frame of {len(view)} bytes ends within its header of {header_length}")
    message = _decode_header(view[_PREFIX.size : body])
    if isinstance(message, Unknown):
        return message
    array = _array_of(message)
    promised = 0 if array is None else array.nbytes
    if len(view) - body != promised:
        raise ProtocolError(f"a frame brings {len(view) - body} bytes of tensor and its header promises {promised}")
    if array is not None:
        msgspec.structs.force_setattr(array, "data", view[body:])  # nobody else has seen it yet
    return message


async def read_length(reader: asyncio.StreamReader, limit: int) -> int | None:
    """How many bytes the next frame has, its length not counted; `None` when the stream ended before it began.

    Raises `ProtocolError` for a frame that no peer sends, longer than `limit` bytes for one, and `NetworkError` for a stream
    that ends within; the stream is of no use afterwards.
    """
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise _cut(len(error.partial), LENGTH.size) from None
    if not _PREFIX.size <= length <= limit:
        raise ProtocolError(f"a peer announces a frame of {length} bytes; one has {_PREFIX.size} to {limit}")
    return int(length)


async def read_body(reader: asyncio.StreamReader, length: int, arrived: Callable[[int], None]) -> memoryview:
    """The frame, without its length, of which `read_length` told `length`.

    Memory grows with what arrives and not with what is claimed; `arrived` is told of every piece, in bytes, before it is kept,
    and may raise. Raises `NetworkError` for a stream that ends within, as a peer's that dies. The deadline is the caller's.
    """
    body = bytearray()
    while len(body) < length:
        piece = await reader.read(length - len(body))
        if not piece:
            raise _cut(len(body), length)
        arrived(len(piece))
        body += piece
    return memoryview(body).toreadonly()


def _cut(received: int, expected: int) -> NetworkError:
    return NetworkError(f"the stream ended within a frame: {received} of {expected} bytes came")


def _array_of(message: WireMessage) -> Array | None:
    return message.hidden if isinstance(message, _WITH_TENSOR) else None


def _decode_header(header: memoryview) -> WireMessage | Unknown:
    try:
        return _DECODER.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        kind = _kind_of(header)
        if kind is not None and kind not in _KINDS:
            return Unknown(kind)
        raise ProtocolError(f"a frame's header is not understood: {str(error)[:_EXCERPT]}") from None


def _kind_of(header: memoryview) -> str | None:
    try:
        return _KIND_DECODER.decode(header).t
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
