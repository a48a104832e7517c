"""What a server tells the swarm about itself, as bytes and back.

The bytes come from strangers: `decode_record` checks all of it before anybody routes by it or prints it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, Literal

import msgspec

from corolla.errors import InvalidSetting, ServerFault
from corolla.types import Span

MAX_RECORD_BYTES = 16 * 1024
MAX_NAME = 64  # characters
MAX_ADDRESSES = 16
MAX_ADDRESS = 256  # characters
MAX_NEIGHBOURS = 64  # entries of `round_trips`
MAX_BLOCKS = 4096  # of a whole model
MAX_HIDDEN = 2**16  # values of a row
MAX_ADAPTERS = 64  # that a server names
MAX_COUNT = 2**53  # of tokens or sessions; also what JSON carries exactly

ANNOUNCE_EVERY = 5.0  # seconds
LIFETIME = 3 * ANNOUNCE_EVERY
"""Seconds that a record lives: a server that died is listed no longer."""
CLOCKS_DIFFER = 5.0
"""Seconds between two peers' clocks at most; hivemind lets nobody in whose clock is 3 s off."""

_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")  # fingerprints, peers, dtypes and formats
_DIGEST = re.compile(r"[0-9a-f]{64}")  # of adapters

State = Literal["joining", "ready", "draining"]


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One server's announcement. Fields that a later version adds are ignored by an earlier one."""

    peer: str  # libp2p id, base58
    name: str  # for people; at most `MAX_NAME` printable characters
    model: str  # `fingerprint` of the checkpoint's config
    checkpoint: str  # `Checkpoint.digest` of its weights
    start: int
    end: int  # the span [start, end)
    blocks: int  # of the whole model
    hidden: int  # values of a row between blocks
    dtype: str
    weights: str  # how they are held: packed, plain, int8 or int4
    throughput: float  # rows a second through one block of this server, measured
    free_tokens: int  # cache positions that nobody holds
    active: int  # sessions with a step under way
    round_trips: dict[str, float]  # seconds to the servers that may come next, by peer id
    addresses: tuple[str, ...]  # multiaddrs
    version: str  # of Corolla
    state: State
    expires: float  # unix time, seconds
    adapters: dict[str, str] = {}  # the LoRA adapters that it holds: their digests by name
    takes_adapters: bool = False  # whether clients may send others

    @property
    def span(self) -> Span:
        """The blocks that the server holds."""
        return Span(self.start, self.end)

    @property
    def embeds(self) -> bool:
        """Whether token ids may go in here."""
        return self.start == 0

    @property
    def heads(self) -> bool:
        """Whether tokens are sampled here."""
        return self.end == self.blocks


_decoder = msgspec.msgpack.Decoder(ServerRecord)


def encode_record(record: ServerRecord) -> bytes:
    """The record as msgpack. Raises `InvalidSetting` when no peer would accept it."""
    encoded = msgspec.msgpack.encode(record)
    problem = _problem(record)
    if problem is None and len(encoded) > MAX_RECORD_BYTES:
        problem = f"it takes {len(encoded)} bytes and a record has at most {MAX_RECORD_BYTES}"
    if problem is not None:
        raise InvalidSetting("record", problem)
    return encoded


def decode_record(encoded: bytes) -> ServerRecord:
    """The record that a peer published. Raises `ServerFault` for anything that `encode_record` would not write."""
    if len(encoded) > MAX_RECORD_BYTES:
        raise ServerFault(f"a server's record takes {len(encoded)} bytes, at most {MAX_RECORD_BYTES} are read: ignored")
    try:
        record = _decoder.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServerFault(f"a server's record cannot be read ({error}): ignored") from error
    problem = _problem(record)
    if problem is not None:
        raise ServerFault(f"a server's record is refused: {problem}")
    return record


def fingerprint(config: dict[str, Any]) -> str:
    """Sixteen hex digits that name the mathematics a model's config.json describes.

    Equal for two copies of one checkpoint, wherever they lie and in whatever dtype they are loaded: paths, versions, dtypes and
    quantization are left out, as are keys that are null, and 10000 equals 10000.0. Weights are not looked at, so that a client
    without any can name the model: a record's `checkpoint` tells those of one configuration apart.
    """
    described = json.dumps(_mathematics(config), sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.blake2b(described.encode(), digest_size=8, person=b"corolla-model").hexdigest()


# What a config.json says about the file, the library or the run rather than about the model.
_BOOKKEEPING = frozenset(
    {
        "architectures",
        "attn_implementation",
        "dtype",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)


def _mathematics(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {str(key): item for key, item in value.items() if item is not None}
        return {key: _mathematics(item) for key, item in kept.items() if key not in _BOOKKEEPING and not key.startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_mathematics(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def is_word(text: str) -> bool:
    """Whether it is 1 to 64 letters, digits, dots, dashes and underscores, as fingerprints and peer ids are."""
    return _WORD.fullmatch(text) is not None


def _problem(record: ServerRecord) -> str | None:
    """Why the record is not to be believed, or None. The types hold already."""
    for field in ("peer", "model", "checkpoint", "dtype", "weights"):
        if not is_word(getattr(record, field)):
            return f"{field} is not 1 to 64 letters, digits, dots, dashes and underscores"
    # A terminal prints these, so no control characters; a version may carry a "+local" part.
    for field, most in (("name", MAX_NAME), ("version", MAX_NAME)):
        text = getattr(record, field)
        if len(text) > most or not text.isprintable():
            return f"{field} is not at most {most} printable characters"
    if not 0 <= record.start < record.end <= record.blocks <= MAX_BLOCKS:
        return f"{record.start}:{record.end} is no span of {record.blocks} blocks (a model has at most {MAX_BLOCKS})"
    if not 1 <= record.hidden <= MAX_HIDDEN:
        return f"hidden is not from 1 to {MAX_HIDDEN}"
    for field in ("throughput", "expires"):
        if not _is_amount(getattr(record, field)):
            return f"{field} is not a finite number of at least 0"
    for field in ("free_tokens", "active"):
        if not 0 <= getattr(record, field) <= MAX_COUNT:
            return f"{field} is not from 0 to {MAX_COUNT}"
    if len(record.round_trips) > MAX_NEIGHBOURS:
        return f"round_trips has {len(record.round_trips)} entries, at most {MAX_NEIGHBOURS} are read"
    if not all(is_word(peer) and _is_amount(seconds) for peer, seconds in record.round_trips.items()):
        return "round_trips is not finite seconds by peer id"
    if len(record.adapters) > MAX_ADAPTERS:
        return f"there are {len(record.adapters)} adapters, at most {MAX_ADAPTERS} are read"
    if not all(is_word(name) and _DIGEST.fullmatch(digest) for name, digest in record.adapters.items()):
        return "adapters is not digests of 64 hexadecimal digits by name"
    if len(record.addresses) > MAX_ADDRESSES:
        return f"there are {len(record.addresses)} addresses, at most {MAX_ADDRESSES} are read"
    if not all(0 < len(address) <= MAX_ADDRESS and address.isascii() and address.isprintable() for address in record.addresses):
        return f"an address is not 1 to {MAX_ADDRESS} printable ASCII characters"
    return None


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and value >= 0
