"""Forward and backward of whole sequences through remote blocks, without a session: servers keep nothing between two calls.

The client keeps what entered each server, so that a backward goes from server to server in reverse, and any of them may be
another than in the forward.

Legend: T rows of all sequences, E hidden, B blocks, P soft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from corolla.errors import CapacityError, InvalidSetting, NetworkError, ProtocolError, ServerFault
from corolla.remote.servers import Fault, Servers
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.wire import MAX_STEP_TOKENS, Array, BackwardFrame, ForwardFrame, Hop, ResultFrame, WireDtype
from corolla.types import Span

_Done = TypeVar("_Done")
_WIRE_DTYPES: dict[torch.dtype, WireDtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One server's share of a forward, and the rows [T, E] that entered it."""

    hop: Hop
    entered: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Trail:
    """The way that some of a batch's sequences took, in order."""

    lengths: tuple[int, ...]
    parts: tuple[Part, ...]


class Calls:
    """Forward and backward over a model's servers. For any thread.

    Rows and prompts come in any floating dtype, on any device; results have the dtype and the device of the rows.
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self._threads = ThreadPoolExecutor(servers.config.parallel, thread_name_prefix="corolla-calls")

    def close(self) -> None:
        """Take no more calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def forward(
        self, span: Span, lengths: Sequence[int], hidden_TxE: torch.Tensor, prompts_BxPxE: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[Trail]]:
        """The rows [T, E] that leave the last block of `span`, and what `backward` needs.

        Args:
            lengths: the rows of each sequence, which lie one behind another and attend to themselves only.
            prompts: added to the first P rows of every sequence at each block's input.

        Raises:
            NoRoute: no servers hold the blocks, and none came in time.
            ServerFault, NetworkError: more servers failed than may.
            CallerError: what was sent can be computed by nobody; the sentence says why.
        """
        if max(lengths) > MAX_STEP_TOKENS:
            raise InvalidSetting("lengths", f"a sequence of {max(lengths)} rows; one call carries {MAX_STEP_TOKENS}")
        groups = _grouped(lengths, self.servers.config.call_rows)
        pieces = hidden_TxE.detach().split([sum(group) for group in groups])
        done = self._each(lambda index: self._forward(span, groups[index], pieces[index], prompts_BxPxE), len(groups))
        return torch.cat([out for out, _ in done]), [trail for _, trail in done]

    def backward(
        self, trails: Sequence[Trail], gradient_TxE: torch.Tensor, prompts_BxPxE: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients with respect to the rows [T, E] and to the prompts [B, P, E], of what has this gradient with respect to
        the rows that left the last block. Raises what `forward` raises."""
        pieces = gradient_TxE.detach().split([sum(trail.lengths) for trail in trails])
        done = self._each(lambda index: self._backward(trails[index], pieces[index], prompts_BxPxE), len(trails))
        of_prompts = None if prompts_BxPxE is None else torch.stack([soft for _, soft in done if soft is not None]).sum(0)
        return torch.cat([rows for rows, _ in done]), of_prompts

    def _each(self, work: Callable[[int], _Done], count: int) -> list[_Done]:
        return [work(0)] if count == 1 else list(self._threads.map(work, range(count)))

    def _forward(
        self, span: Span, lengths: tuple[int, ...], hidden_TxE: torch.Tensor, prompts_BxPxE: torch.Tensor | None
    ) -> tuple[torch.Tensor, Trail]:
        parts: list[Part] = []
        hops: list[Hop] = []
        retries = self.servers.retries()
        at = span.start
        while at < span.end:
            hops = hops or list(self.servers.hops(Span(at, span.end)))
            hop = hops.pop(0)
            try:
                left = self._ask(hop, ForwardFrame, lengths, hidden_TxE, _of(prompts_BxPxE, span.start, hop))
            except (Fault, CapacityError) as error:
                retries.bear(error)
                hops = []
                continue
            parts.append(Part(hop, hidden_TxE))
            hidden_TxE, at = left, hop.end
        return hidden_TxE, Trail(lengths, tuple(parts))

    def _backward(
        self, trail: Trail, gradient_TxE: torch.Tensor, prompts_BxPxE: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = list(trail.parts)
        start, rows = parts[0].hop.start, sum(trail.lengths)
        of_prompts: list[torch.Tensor] = []
        retries = self.servers.retries()
        while parts:
            hop, entered = parts[-1].hop, parts[-1].entered
            soft = _of(prompts_BxPxE, start, hop)
            try:
                gradients = self._ask(hop, BackwardFrame, trail.lengths, torch.cat([entered, gradient_TxE.to(entered)]), soft)
            except (Fault, CapacityError) as error:
                retries.bear(error)
                parts[-1:] = self._again(parts[-1], trail.lengths, soft)
                continue
            gradient_TxE = gradients[:rows]
            if soft is not None:
                of_prompts.append(gradients[rows:].view(soft.shape))
            parts.pop()
        return gradient_TxE, torch.cat(of_prompts[::-1]) if of_prompts else None

    def _again(self, part: Part, lengths: tuple[int, ...], soft: torch.Tensor | None) -> Sequence[Part]:
        """The same blocks at the servers that are to be taken now; where these are several, what enters each is computed."""
        span = Span(part.hop.start, part.hop.end)
        hops = self.servers.hops(span)
        if len(hops) == 1:
            return [Part(hops[0], part.entered)]
        return self._forward(span, lengths, part.entered, soft)[1].parts

    def _ask(
        self,
        hop: Hop,
        kind: type[ForwardFrame] | type[BackwardFrame],
        lengths: tuple[int, ...],
        rows: torch.Tensor,
        soft_BxPxE: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the server answers. Raises `Fault`, `CallerError`, `CapacityError`."""
        servers, width = self.servers, 0 if soft_BxPxE is None else soft_BxPxE.shape[1]
        call = servers.number()
        dtype = servers.config.wire_dtype or wire_dtype_of(rows.dtype)
        sent = rows if soft_BxPxE is None else torch.cat([rows, soft_BxPxE.detach().flatten(0, 1).to(rows)])
        frame = kind(call, hop.start, hop.end, lengths, to_array(sent, dtype), width)
        expected = sum(lengths) + (frame.prompt_rows if kind is BackwardFrame else 0)
        with servers.mailbox(str(call)) as mailbox:
            servers.network.send(hop.peer, frame)
            try:
                _, answer = mailbox.wait((hop.peer,))
            except InvalidSetting as error:
                if error.setting != "blocks":
                    raise
                # The route is right by the server's record: it has moved since.
                raise Fault(hop.peer, NetworkError("it holds other blocks than its record says")) from error
        if not isinstance(answer, ResultFrame):
            raise Fault(hop.peer, ProtocolError("it answered a call as if it were a session"))
        result = checked(answer.hidden, (expected, rows.shape[1]), hop.peer)
        servers.bans.forgive(hop.peer)
        return result.to(rows)


def wire_dtype_of(dtype: torch.dtype) -> WireDtype:
    """As what rows of this dtype travel. Raises `InvalidSetting` for one that no server takes."""
    if dtype not in _WIRE_DTYPES:
        raise InvalidSetting("dtype", f"hidden states are {dtype}; blocks take {', '.join(map(str, _WIRE_DTYPES))}")
    return _WIRE_DTYPES[dtype]


def checked(array: Array, shape: tuple[int, int], peer: str) -> torch.Tensor:
    """The tensor that a server answered. Raises `Fault` when it is of another shape, or not finite."""
    if array.shape != shape:
        raise Fault(peer, ProtocolError(f"it answered values of shape {list(array.shape)} where {list(shape)} were asked for"))
    tensor = from_array(array)
    if not bool(tensor.isfinite().all()):
        raise Fault(peer, ServerFault("it answered values that are NaN or infinite"))
    return tensor


def _grouped(lengths: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Neighbouring sequences of at most so many rows together; a longer one goes alone."""
    groups: list[list[int]] = [[]]
    for length in lengths:
        if groups[-1] and sum(groups[-1]) + length > most:
            groups.append([])
        groups[-1].append(length)
    return [tuple(group) for group in groups]


def _of(prompts_BxPxE: torch.Tensor | None, start: int, hop: Hop) -> torch.Tensor | None:
    """The prompts of one server's blocks, of those from block `start` on."""
    return None if prompts_BxPxE is None else prompts_BxPxE[hop.start - start : hop.end - start]
