from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import InvalidSetting, ServerFault
from corolla.swarm.records import MAX_RECORD_BYTES, ServerRecord, decode_record, encode_record, fingerprint
from corolla.types import Span

RECORD = ServerRecord(
    peer="QmServer",
    name="the machine under the desk",
    model="0123456789abcdef",
    checkpoint="fedcba9876543210",
    start=0,
    end=12,
    blocks=30,
    hidden=576,
    dtype="bfloat16",
    weights="packed",
    throughput=5000.0,
    free_tokens=8192,
    active=1,
    round_trips={"QmOther": 0.02},
    addresses=("/ip4/127.0.0.1/tcp/4000/p2p/QmServer",),
    version="0.2.0+local",
    state="ready",
    expires=1_800_000_000.0,
    adapters={"poet": "0123456789abcdef" * 4},
    takes_adapters=True,
)


def altered(**fields: Any) -> bytes:
    """The bytes of a record with some fields as a peer might send them."""
    return msgspec.msgpack.encode({**msgspec.to_builtins(RECORD), **fields})


def test_a_record_survives_the_way_there_and_back() -> None:
    assert decode_record(encode_record(RECORD)) == RECORD


def test_a_record_knows_its_span_and_its_ends() -> None:
    assert RECORD.span == Span(0, 12)
    assert (RECORD.embeds, RECORD.heads) == (True, False)
    last = msgspec.structs.replace(RECORD, start=12, end=30)
    assert (last.embeds, last.heads) == (False, True)


def test_a_field_of_a_later_version_is_ignored() -> None:
    assert decode_record(altered(electricity="green")) == RECORD


@pytest.mark.parametrize(
    "fields",
    [
        {"peer": ""},
        {"peer": "Qm" * 40},
        {"model": "../../etc"},
        {"name": "x" * 65},
        {"name": "\x1b[2Jgone"},
        {"version": "1\n2"},
        {"start": -1},
        {"start": 12},
        {"end": 31},
        {"end": 2**64 - 1},
        {"blocks": 10**6, "end": 10**6},
        {"hidden": 0},
        {"hidden": 2**20},
        {"throughput": float("nan")},
        {"throughput": float("inf")},
        {"throughput": -1.0},
        {"throughput": "fast"},
        {"expires": float("nan")},
        {"free_tokens": -1},
        {"free_tokens": 2**60},
        {"active": True},
        {"round_trips": {"QmOther": float("nan")}},
        {"round_trips": {"Qm Other": 0.1}},
        {"round_trips": {f"Qm{i}": 0.1 for i in range(65)}},
        {"addresses": ["/ip4/127.0.0.1/tcp/1"] * 17},
        {"addresses": ["/" + "x" * 256]},
        {"addresses": [""]},
        {"adapters": {"a poet": "0" * 64}},
        {"adapters": {"poet": "0" * 63}},
        {"adapters": {f"poet-{i}": "0" * 64 for i in range(65)}},
        {"state": "asleep"},
        {"peer": None},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ServerFault):
        decode_record(altered(**fields))


def test_a_missing_field_and_trailing_bytes_are_refused() -> None:
    fields = msgspec.to_builtins(RECORD)
    del fields["state"]
    for encoded in (msgspec.msgpack.encode(fields), encode_record(RECORD) + b"\x00", b"", b"\xc1"):
        with pytest.raises(ServerFault):
            decode_record(encoded)


def test_a_long_record_is_refused_unread() -> None:
    with pytest.raises(ServerFault, match="at most"):
        decode_record(bytes(MAX_RECORD_BYTES + 1))


def test_nobody_publishes_what_nobody_would_believe() -> None:
    with pytest.raises(InvalidSetting, match="name"):
        encode_record(msgspec.structs.replace(RECORD, name="x" * 65))


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_politely(encoded: bytes) -> None:
    with pytest.raises(ServerFault):
        decode_record(encoded)


@given(st.integers(min_value=0), st.integers(0, 7))
def test_a_flipped_bit_gives_a_record_or_a_refusal(place: int, bit: int) -> None:
    encoded = bytearray(encode_record(RECORD))
    encoded[place % len(encoded)] ^= 1 << bit
    with contextlib.suppress(ServerFault):
        encode_record(decode_record(bytes(encoded)))


CONFIG = {"model_type": "llama", "hidden_size": 576, "rope_theta": 10000, "text": {"layers": [1, 2], "torch_dtype": "bfloat16"}}


def test_a_fingerprint_is_stable() -> None:
    assert fingerprint(CONFIG) == fingerprint(dict(reversed(CONFIG.items())))
    assert len(fingerprint(CONFIG)) == 16
    assert int(fingerprint(CONFIG), 16) >= 0


@pytest.mark.parametrize(
    "fields",
    [
        {"_name_or_path": "/home/me/model"},
        {"transformers_version": "5.23.0"},
        {"torch_dtype": "float32", "dtype": "float32"},
        {"rope_theta": 10000.0},
        {"sliding_window": None},
        {"text": {"layers": [1, 2], "torch_dtype": "float32"}},
    ],
    ids=str,
)
def test_a_fingerprint_is_not_of_the_file(fields: dict[str, Any]) -> None:
    assert fingerprint({**CONFIG, **fields}) == fingerprint(CONFIG)


@pytest.mark.parametrize("fields", [{"hidden_size": 577}, {"rope_theta": 1e6}, {"tie": True}, {"text": {"layers": [2, 1]}}], ids=str)
def test_a_fingerprint_is_of_the_mathematics(fields: dict[str, Any]) -> None:
    assert fingerprint({**CONFIG, **fields}) != fingerprint(CONFIG)
