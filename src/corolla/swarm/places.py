"""Where Corolla's entries lie in a swarm's DHT: under one key of the whole swarm, and under one key for each model.

A DHT node sees only a hash of a key. So an entry says its key in clear, under its signature, and no node keeps an entry under
any other: the DHT is no store for whoever wants to fill one.
"""

from __future__ import annotations

import re

import msgspec

INDEX = "corolla/2/models"
_MODEL = "corolla/2/model/"
_FINGERPRINT = re.compile(r"[A-Za-z0-9._-]{1,64}")


def model_key(model: str) -> str:
    """The key of a model's servers; `model` is its fingerprint."""
    return _MODEL + model


def is_place(key: str) -> bool:
    """Whether Corolla keeps anything under `key`."""
    return key == INDEX or (key.startswith(_MODEL) and _FINGERPRINT.fullmatch(key, len(_MODEL)) is not None)


class Placed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An entry and the key that it lies under."""

    key: str
    entry: bytes


_decoder = msgspec.msgpack.Decoder(Placed)


def encode_placed(key: str, entry: bytes) -> bytes:
    return msgspec.msgpack.encode(Placed(key, entry))


def decode_placed(encoded: bytes) -> Placed:
    """Raises `msgspec.DecodeError` for anything else, and for a key of no place."""
    placed = _decoder.decode(encoded)
    if not is_place(placed.key):
        raise msgspec.ValidationError("it lies under a key that Corolla does not use")
    return placed
