"""What a forward call leaves for its backward: the operations and values of every block, so that none is computed again.

They are kept for a while, as far as there is room, for the client that sent the call. Where they are gone, the client sends what
entered the blocks again, and the backward computes the forward first (`calls.backward`). Backwards that follow one another, as those of
one step do, share the weights that the first of them has widened, as far as there is room for these too.

Legend: T rows of all sequences, E hidden, B blocks, P soft tokens.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass, field

import torch

from corolla.engine.calls import AddedPrompts, CallSequences, Gradients, RowChunk, pieces_of, through
from corolla.errors import ActivationsGone
from corolla.models.block import Block
from corolla.models.span import SpanModel

_OVERHEAD = 4096  # bytes that a piece of a block takes beside its values


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationLimits:
    size: int = 2 * 2**30  # bytes of all that is kept; a client may have half of it
    seconds: float = 120.0  # for which a backward is waited for


@dataclass(slots=True, eq=False)
class SavedForward:
    """One forward. Each block's part is what entered it and what left it, for each piece of the rows."""

    lengths: tuple[int, ...]
    pieces: list[RowChunk]
    prompts: AddedPrompts
    prompted: bool
    blocks: list[tuple[Block, list[tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=list)
    size: int = 0
    since: float = field(default_factory=time.monotonic)


def forward(
    model: SpanModel, sequences: CallSequences, store: ActivationStore, client: str
) -> Generator[None, None, tuple[torch.Tensor, SavedForward | None]]:
    """`calls.forward`, which also returns what a backward needs, for `store`; None where that would take more than it has room for."""
    most = store.most(client)
    pieces, prompts = pieces_of(model, sequences.lengths), AddedPrompts(model, sequences)
    kept: SavedForward | None = SavedForward(sequences.lengths, pieces, prompts, sequences.prompts is not None)
    hidden = sequences.hidden.to(model.device, model.dtype)
    for index, block in enumerate(model.blocks_of(sequences.span)):
        hidden = prompts.added(hidden, index)
        if kept is None:
            hidden = yield from through(block, hidden, pieces)
            continue
        hidden = yield from _recorded(store.differentiable(block), hidden, kept)
        if kept.size > most:
            kept = None
    return hidden, kept


def backward(model: SpanModel, kept: SavedForward, store: ActivationStore, gradient_TxE: torch.Tensor) -> Generator[None, None, Gradients]:
    """`calls.backward` from a forward that was taken from `store`, which is used up by it."""
    gradient = gradient_TxE.to(model.device, model.dtype)
    of_prompts = []
    try:
        while kept.blocks:
            block, passed = kept.blocks.pop()
            out = torch.empty_like(gradient)
            try:
                for piece, (entered, left) in zip(kept.pieces, passed, strict=True):
                    (out[piece.rows],) = torch.autograd.grad(left, entered, gradient[piece.rows])
                    yield
            except BaseException:  # GeneratorExit too: a call that is dropped is closed at its `yield`
                store.drop(block)
                raise
            store.passed(block)
            gradient = out
            of_prompts.append(kept.prompts.summed(gradient))
    finally:
        store.tidy()
    return Gradients(gradient, torch.stack(of_prompts[::-1]) if kept.prompted else None)


def _recorded(block: Block, hidden_TxE: torch.Tensor, kept: SavedForward) -> Generator[None, None, torch.Tensor]:
    out, passed, sizes = torch.empty_like(hidden_TxE), list[tuple[torch.Tensor, torch.Tensor]](), dict[int, int]()

    # The graph holds this function: were `kept`, which holds the graph, among its variables, nothing would ever free the two.
    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its history it would keep itself alive

    for piece in kept.pieces:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            entered = hidden_TxE[piece.rows].detach().requires_grad_()
            left = block(entered, piece.attention, piece.turns)
        out[piece.rows] = left.detach()
        passed.append((entered, left))
        kept.size += entered.nbytes + _OVERHEAD
        yield
    kept.blocks.append((block, passed))
    kept.size += sum(sizes.values())
    return out


class ActivationStore:
    """Those of one server, by client and call. For any thread."""

    def __init__(self, limits: ActivationLimits | None = None) -> None:
        self.limits = limits or ActivationLimits()
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], SavedForward] = OrderedDict()  # the oldest first
        self._blocks: dict[Block, Block] = {}  # differentiable ones, by what they are of
        self._widened: dict[Block, int] = {}  # bytes of the differentiable ones that hold their weights widened

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(kept.size for kept in self._kept.values())

    @property
    def widened(self) -> int:
        """Bytes of weights that stay widened for backwards to come."""
        return sum(self._widened.values())

    def most(self, client: str) -> int:
        """Bytes that a client's next forward may take, beside its others."""
        with self._lock:
            self._forget_old()
            own = sum(kept.size for key, kept in self._kept.items() if key[0] == client)
            return min(self.limits.size // 2 - own, self.limits.size - self.size)

    def put(self, client: str, call: int, kept: SavedForward) -> None:
        """Until it is taken, for as long as the limits say."""
        with self._lock:
            self._kept[client, call] = kept
            full = self.size + self.widened > self.limits.size
        if full:
            self._drop_all()

    def take(self, client: str, call: int) -> SavedForward:
        """Raises `ActivationsGone`."""
        with self._lock:
            self._forget_old()
            kept = self._kept.pop((client, call), None)
        if kept is None:
            raise ActivationsGone
        return kept

    def lose(self, client: str) -> None:
        """Forget a client's."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == client]:
                del self._kept[key]
        self.tidy()

    def differentiable(self, block: Block) -> Block:
        """One for all forwards: `passed` has to be told when a backward is through."""
        with self._lock:
            return self._blocks.setdefault(block, block.differentiable())

    def passed(self, block: Block) -> None:
        """A backward is through `block`: its widened weights stay where other backwards are to come and there is room."""
        size = sum(linear.widened().nbytes for linear in block.linears)
        with self._lock:
            others = sum(held for other, held in self._widened.items() if other is not block)
            stays = bool(self._kept) and self.size + others + size <= self.limits.size
            if stays:
                self._widened[block] = size
            else:
                self._widened.pop(block, None)
        if not stays:
            block.drop()

    def drop(self, block: Block) -> None:
        """A backward through `block` came to no end: none of its weights stays widened."""
        with self._lock:
            self._widened.pop(block, None)
        block.drop()

    def tidy(self) -> None:
        """Where no backward is to come, no weights stay widened."""
        with self._lock:
            needed = bool(self._kept)
        if not needed:
            self._drop_all()

    def _drop_all(self) -> None:
        with self._lock:
            held, self._widened = self._widened, {}
            for block in held:
                block.drop()

    def _forget_old(self) -> None:
        since = time.monotonic() - self.limits.seconds
        while self._kept and next(iter(self._kept.values())).since < since:
            self._kept.popitem(last=False)
