"""The LoRA adapters that a server keeps, its own and those that clients sent, and the rows of a step that they are added to.

An adapter is named by the digest of its content, and every block that comes is checked against it: so one that a client has sent
serves all. Those of clients are forgotten when their room is needed, the longest unused first, and asked for again when a step names
them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from corolla.engine.arrays import stays_finite
from corolla.engine.batch import ScheduledSequence
from corolla.engine.converting import Convert, converted
from corolla.errors import AdapterNeeded, CorollaError, InvalidSetting, NetworkError
from corolla.models.adapted import AdapterRun, Adapting, Blocks
from corolla.models.adapters import digest_of, joined_digest
from corolla.models.span import SpanModel
from corolla.types import AdapterPart, Factors, Span, Step

_REFUSALS = 64  # that are remembered


OVERHEAD = 4096  # bytes that an adapter or a block of one takes beside its values


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    size: int = 512 * 2**20  # bytes of all adapters that clients sent
    size_per_client: int = 256 * 2**20
    count: int = 1024  # of those that clients sent


@dataclass(slots=True, eq=False)
class StoredAdapter:
    """An adapter, as far as it is here. See `models.adapted.Blocks`: blocks that are not `ready` are as they were sent."""

    client: str | None  # who sent it first; None for one that stays
    size: int = OVERHEAD  # bytes
    blocks: dict[int, Mapping[str, Factors]] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)

    def covers(self, span: Span) -> bool:
        return all(block in self.blocks for block in range(span.start, span.end))


class AdapterStore:
    """For any thread, but for `find`, which converts what it finds: that is for the thread that computes.

    `takes` is whether clients may send adapters.
    """

    def __init__(self, model: SpanModel, limits: AdapterLimits | None = None, *, takes: bool = True, convert: Convert = converted) -> None:
        self._model, self._limits, self.takes, self._convert = model, limits or AdapterLimits(), takes, convert
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, StoredAdapter] = OrderedDict()  # the longest unused first
        self._refused: OrderedDict[tuple[str, str], CorollaError] = OrderedDict()  # by client and digest

    def __len__(self) -> int:
        return len(self._kept)

    def hold(self, part: AdapterPart) -> None:
        """Keep an adapter for good, however large. Raises `InvalidSetting` like `put`."""
        blocks = self._checked(part)
        with self._lock:
            kept = self._kept.setdefault(part.digest, StoredAdapter(None))
            kept.client = None
            self._add(kept, blocks)

    def put(self, client: str, part: AdapterPart) -> None:
        """Keep what `client` sent of an adapter.

        Raises `InvalidSetting` for one that these blocks do not take, that is not what its digest names, that is not finite, or that
        is larger than is kept; from then on `check` raises it too.
        """
        try:
            if not self.takes:
                raise InvalidSetting("adapter", "this server takes none from clients")
            self._keep(client, part)
        except InvalidSetting as error:
            with self._lock:
                self._refused[client, part.digest] = error
                while len(self._refused) > _REFUSALS:
                    self._refused.popitem(last=False)
            raise

    def find(self, digest: str, span: Span) -> StoredAdapter | None:
        """The adapter, if it is here for all blocks of `span`, which are in the model's dtype and on its device then."""
        with self._lock:
            kept = self._kept.get(digest)
            if kept is None or not kept.covers(span):
                return None
            self._kept.move_to_end(digest)
        for index in range(span.start, span.end):
            if index not in kept.ready:
                self._make_ready(kept, index)
        return kept

    def holds(self, digest: str, span: Span) -> bool:
        """Whether the adapter is here for all blocks of `span`."""
        kept = self._kept.get(digest)
        return kept is not None and kept.covers(span)

    def check(self, step: Step, span: Span) -> None:
        """Raises `AdapterNeeded` where the step's adapter has to be sent, and `NetworkError` where this server takes none."""
        if not step.adapter or self.holds(step.adapter, span):
            return
        refusal = self._refused.get((step.client, step.adapter))
        if refusal is not None:
            raise refusal
        if not self.takes:
            raise NetworkError(
                f"this server has no adapter {step.adapter[:12]}: it may have begun anew without it since its record was read"
            )
        raise AdapterNeeded

    def _keep(self, client: str, part: AdapterPart) -> None:
        blocks, limits = self._checked(part), self._limits
        with self._lock:
            kept = self._kept.get(part.digest)
            size = sum(_size(block) for index, block in blocks.items() if kept is None or index not in kept.blocks)
            size += OVERHEAD if kept is None else 0
            if kept is None or kept.client is not None:
                self._make_room(size, limits.size_per_client, part.digest, lambda other: other.client == client)
                self._make_room(size, limits.size, part.digest, lambda other: other.client is not None)
            self._add(self._kept.setdefault(part.digest, StoredAdapter(client)), blocks)
            self._kept.move_to_end(part.digest)
            of_clients = [digest for digest, kept in self._kept.items() if kept.client is not None]
            for digest in of_clients[: -limits.count]:
                del self._kept[digest]

    def _add(self, kept: StoredAdapter, blocks: Mapping[int, Mapping[str, Factors]]) -> None:
        for index, block in blocks.items():
            if index not in kept.blocks:
                kept.size += _size(block)
                kept.blocks[index] = block

    def _make_room(self, size: int, limit: int, growing: str, counts: Callable[[StoredAdapter], bool]) -> None:
        """For `size` more bytes of the adapter `growing`. Raises `InvalidSetting` when it is larger than the limit by itself."""
        held = {digest: kept for digest, kept in self._kept.items() if counts(kept)}
        own = held[growing].size if growing in held else 0
        if own + size > limit:
            raise InvalidSetting("adapter", f"it takes more than the {limit} bytes that clients have here: use one of a lower rank")
        left = limit - size - sum(kept.size for kept in held.values())
        for digest, kept in held.items():
            if left >= 0:
                return
            if digest != growing:
                del self._kept[digest]
                left += kept.size

    def _checked(self, part: AdapterPart) -> dict[int, Mapping[str, Factors]]:
        """The part's blocks by their indices."""
        own, shapes = self._model.span, self._model.arch.products
        if not own.start <= part.span.start < part.span.end <= own.end:
            raise InvalidSetting("adapter", f"it is for blocks {part.span}, which are not among the blocks {own} held here")
        if len(part.digests) != self._model.arch.blocks or joined_digest(part.digests) != part.digest:
            raise InvalidSetting("adapter", "its digest is not that of as many blocks as this model has")
        for index, block in zip(range(part.span.start, part.span.end), part.blocks, strict=True):
            for product, (a, b) in block.items():
                outputs, inputs = shapes.get(product, (0, 0))
                if a.shape != (len(a), inputs) or b.shape != (outputs, len(a)):
                    raise InvalidSetting("adapter", f"what it adds to {product} of block {index} does not fit this model")
            if digest_of(block) != part.digests[index]:
                raise InvalidSetting("adapter", f"what came for block {index} is not what its digest names")
            if not all(stays_finite(factor, self._model.dtype) for factors in block.values() for factor in factors):
                raise InvalidSetting("adapter", f"some of its values are NaN, infinite, or too large for this server's {self._model.dtype}")
        return dict(zip(range(part.span.start, part.span.end), part.blocks, strict=True))

    def _make_ready(self, kept: StoredAdapter, index: int) -> None:
        model, before = self._model, kept.blocks[index]
        ready = {
            product: Factors(*(self._convert(factor, model.device, model.dtype) for factor in factors))
            for product, factors in before.items()
        }
        with self._lock:
            kept.blocks[index] = ready
            kept.ready.add(index)
            kept.size += _size(ready) - _size(before)


def adapting(works: Sequence[ScheduledSequence], padded: Callable[[int], int], total: int, *, alone_alike: bool) -> Adapting | None:
    """What the adapters of a step's sessions add, in a forward of `total` rows; None where no session has any.

    Args:
        padded: how many rows to compute where so many are wanted.
        alone_alike: see `Adapting`.
    """
    runs = [
        AdapterRun(adapter, rows, _window(rows, padded(rows.stop - rows.start), total))
        for adapter, rows in _runs(works)
        if adapter is not None
    ]
    return Adapting(runs, alone_alike=alone_alike) if runs else None


def _runs(works: Sequence[ScheduledSequence]) -> Iterator[tuple[Blocks | None, slice]]:
    at = 0
    for _, same in groupby(works, key=lambda work: id(work.adapter)):
        together = list(same)
        count = sum(work.rows.count for work in together)
        yield together[0].adapter, slice(at, at + count)
        at += count


def _window(rows: slice, count: int, total: int) -> slice:
    """`count` of the `total` rows, those of `rows` among them."""
    start = min(rows.start, total - min(count, total))
    return slice(start, min(start + count, total))


def _size(block: Mapping[str, Factors]) -> int:
    return OVERHEAD + sum(factor.nbytes for factors in block.values() for factor in factors)
