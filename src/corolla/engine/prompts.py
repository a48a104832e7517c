"""The soft prompts that a server keeps for its clients, and what a step puts in of them.

Each client's are kept apart: a name says nothing of the content that another client may have sent under it. They are forgotten when
their room is needed, the longest unused first, and asked for again when a step names them.

Legend: P soft tokens, E hidden, N blocks of a span, R rows of a step at positions below P.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch

from corolla.engine.arrays import stays_finite
from corolla.engine.batch import PromptRows, ScheduledSequence
from corolla.engine.converting import Convert, converted
from corolla.errors import InvalidSetting, PromptNeeded
from corolla.models.span import SpanModel
from corolla.types import PromptName, PromptPart, Span, Step

OVERHEAD = 4096  # bytes that a prompt takes beside its values
_Key = tuple[str, PromptName, Span, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    tokens: int = 1024  # of one prompt
    size: int = 512 * 2**20  # bytes of all prompts
    size_per_client: int = 256 * 2**20
    count: int = 1024


class PromptStore:
    """For any thread, but for `find`, which converts what it finds: that is for the thread that computes."""

    def __init__(self, model: SpanModel, limits: PromptLimits | None = None, *, convert: Convert = converted) -> None:
        self._model, self._limits, self._convert = model, limits or PromptLimits(), convert
        self._lock = threading.Lock()
        self._parts: OrderedDict[_Key, PromptPart] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._parts)

    def put(self, client: str, part: PromptPart) -> None:
        """Keep a prompt of `client`'s, in place of whatever it had under that name for these blocks.

        Raises `InvalidSetting` for one that these blocks do not take, that is not finite, or that is larger than is kept.
        """
        self._check(part)
        dtype = self._model.dtype
        if not all(stays_finite(rows, dtype) for rows in (part.input, part.deep) if rows is not None):
            raise InvalidSetting("prompt", f"some of its values are NaN, infinite, or too large for this server's {dtype}")
        limits, size = self._limits, _size(part)
        if size > limits.size_per_client:
            raise InvalidSetting("prompt", f"it takes {size} bytes here and a client has {limits.size_per_client}: use fewer soft tokens")
        with self._lock:
            self._parts.pop((client, part.name, part.span, part.input is not None), None)
            self._make_room(size, limits.size_per_client, client)
            self._make_room(size, limits.size)
            while len(self._parts) >= limits.count:
                self._parts.popitem(last=False)
            self._parts[client, part.name, part.span, part.input is not None] = part

    def find(self, client: str, name: PromptName, span: Span, *, with_input: bool) -> PromptPart | None:
        """The prompt for the blocks `span`, in the model's dtype and on its device, or None where it has to be sent."""
        key = self._key_of(client, name, span, with_input)
        with self._lock:
            part = None if key is None else self._parts.get(key)
            if key is None or part is None:
                return None
            self._parts.move_to_end(key)
        ready = replace(part, input=self._ready(part.input), deep=self._ready(part.deep))
        with self._lock:
            if self._parts.get(key) is part:
                self._parts[key] = ready
        deep = None if ready.deep is None else ready.deep[span.start - part.span.start : span.end - part.span.start]
        return PromptPart(name, span, ready.input if with_input else None, deep)

    def holds(self, client: str, name: PromptName, span: Span, *, with_input: bool) -> bool:
        """Whether the prompt is here for the blocks `span`."""
        return self._key_of(client, name, span, with_input) is not None

    def _key_of(self, client: str, name: PromptName, span: Span, with_input: bool) -> _Key | None:
        with self._lock:
            for key, part in self._parts.items():
                covers = not name.deep or (part.span.start <= span.start and span.end <= part.span.end)
                if key[:2] == (client, name) and covers and (part.input is not None or not with_input):
                    return key
        return None

    def _ready(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        model = self._model
        if rows is None or (rows.dtype == model.dtype and rows.device == model.device):
            return rows
        return self._convert(rows, model.device, model.dtype)

    def check(self, step: Step, span: Span) -> None:
        """Raises `PromptNeeded` where the step cannot be computed without a prompt that is not here."""
        name = step.prompt
        if name is None or step.start >= name.tokens:
            return
        puts_in = span.start == 0 and not isinstance(step.payload, torch.Tensor)
        if (name.deep or puts_in) and not self.holds(step.client, name, span, with_input=puts_in):
            raise PromptNeeded

    def lose(self, client: str) -> None:
        """Forget a client's."""
        with self._lock:
            for key in [key for key in self._parts if key[0] == client]:
                del self._parts[key]

    def _make_room(self, size: int, limit: int, client: str | None = None) -> None:
        held = {key: _size(part) for key, part in self._parts.items() if client in (None, key[0])}
        left = limit - size - sum(held.values())
        for key, bytes_of in held.items():
            if left >= 0:
                return
            del self._parts[key]
            left += bytes_of

    def _check(self, part: PromptPart) -> None:
        own, width, tokens = self._model.span, self._model.arch.hidden, part.name.tokens
        if tokens > self._limits.tokens:
            raise InvalidSetting("prompt", f"{tokens} soft tokens came, and this server takes {self._limits.tokens}")
        if not own.start <= part.span.start < part.span.end <= own.end:
            raise InvalidSetting("prompt", f"it is for blocks {part.span}, which are not among the blocks {own} held here")
        if part.input is not None and part.input.shape != (tokens, width):
            raise InvalidSetting("prompt", f"its input has the shape {list(part.input.shape)} in place of {[tokens, width]}")
        shape = (len(part.span), tokens, width)
        if (part.deep is not None) != part.name.deep or (part.deep is not None and part.deep.shape != shape):
            raise InvalidSetting("prompt", f"what it adds at the blocks has not the shape {list(shape)}, or is not named as deep")


def page_seed(step: Step, *, shared: bool) -> str:
    """What the step's pages are found by beside its tokens: whoever has another adapter or prompt, or a prompt of another client, must
    not find them. Nor must another client, unless pages are `shared`: how soon an answer comes would tell what others asked."""
    client = "" if shared and step.prompt is None else step.client
    return repr((step.adapter, client, "" if step.prompt is None else step.prompt.name))


def put_in(model: SpanModel, works: Sequence[ScheduledSequence], hidden_TxE: torch.Tensor) -> None:
    """Put the prompts' rows in place of the embeddings of their placeholders."""
    at = 0
    for work in works:
        if work.prompt is not None and work.prompt.input is not None:
            rows = work.prompt.input
            hidden_TxE[at : at + len(rows)] = model.enter(rows)
        at += work.rows.count


class DeepRows:
    """What the prompts of a step's sessions add at each block's input: `SpanModel.forward`'s `entering`."""

    def __init__(self, works: Sequence[ScheduledSequence], start: int) -> None:
        """`start` is the first block that the step goes through."""
        begins = accumulate((work.rows.count for work in works), initial=0)
        deep = [(at, work.prompt.deep) for at, work in zip(begins, works, strict=False) if work.prompt and work.prompt.deep is not None]
        self._start = start
        self._added_NxRxE = torch.cat([rows for _, rows in deep], 1)
        places = chain.from_iterable(range(at, at + rows.shape[1]) for at, rows in deep)
        self._places_R = torch.tensor(list(places), device=self._added_NxRxE.device)

    def __call__(self, block: int, hidden_TxE: torch.Tensor) -> torch.Tensor:
        return hidden_TxE.index_add(0, self._places_R, self._added_NxRxE[block - self._start])


def deep_rows(works: Sequence[ScheduledSequence], start: int) -> DeepRows | None:
    """None where no session of the step adds any."""
    return DeepRows(works, start) if any(work.prompt is not None and work.prompt.deep is not None for work in works) else None


def rows_of(part: PromptPart, start: int, count: int) -> PromptRows:
    """What a prompt puts in and adds at `count` positions from `start` on, as far as it reaches."""
    end = min(start + count, part.name.tokens)
    return PromptRows(
        None if part.input is None else part.input[start:end],
        None if part.deep is None else part.deep[:, start:end],
    )


def _size(part: PromptPart) -> int:
    return OVERHEAD + sum(rows.nbytes for rows in (part.input, part.deep) if rows is not None)
