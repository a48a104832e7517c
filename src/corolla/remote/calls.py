"""Forward and backward of whole sequences through remote blocks, without a session.

The client keeps what entered each server, so that a backward goes from server to server in reverse, and any of them may be
another than in the forward. A server may keep what it computed in the forward for a while: then the backward brings the gradients
only, and is computed without a second forward.

Legend: T rows of all sequences, E hidden, B blocks, P soft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from corolla.errors import InvalidSetting, PromptNeeded, ProtocolError, ServerFault
from corolla.messages import Array, BackwardFrame, ForwardFrame, Hop, ResultFrame, WireDtype
from corolla.remote.incoming import Declined, Fault, Forgot
from corolla.remote.mailbox import open_mailbox
from corolla.remote.prompt_upload import DeepPrompt
from corolla.remote.retries import Retries
from corolla.remote.servers import Servers
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.routing import Quality
from corolla.types import MAX_STEP_TOKENS, PromptName, Span

_LEAST_ROWS = 128  # of a call, where there are more
_CALLS = 4  # of a batch, for each server that it goes through

_Done = TypeVar("_Done")
_WIRE_DTYPES: dict[torch.dtype, WireDtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True, eq=False)
class CallPart:
    """One server's share of a forward, and the rows [T, E] that entered it; `call` is the forward's number where the server was asked
    to keep it, else 0."""

    hop: Hop
    entered: torch.Tensor
    call: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Trail:
    """The way that some of a batch's sequences took, in order, and the quality of all of its servers."""

    lengths: tuple[int, ...]
    parts: tuple[CallPart, ...]
    quality: Quality | None = None


class RemoteCalls:
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
        self,
        span: Span,
        lengths: Sequence[int],
        hidden_TxE: torch.Tensor,
        prompts_BxPxE: torch.Tensor | None = None,
        *,
        keep: bool = False,
    ) -> tuple[torch.Tensor, list[Trail]]:
        """The rows [T, E] that leave the last block of `span`, and what `backward` needs.

        Args:
            lengths: the rows of each sequence, which lie one behind another and attend to themselves only.
            prompts: added to the first P rows of every sequence at each block's input.
            keep: ask servers to keep what a backward needs.

        Raises:
            NoRoute: no servers hold the blocks, and none came in time.
            ServerFault, NetworkError: more servers failed than may.
            CallerError: what was sent can be computed by nobody; the sentence says why.
        """
        if max(lengths) > MAX_STEP_TOKENS:
            raise InvalidSetting("lengths", f"a sequence of {max(lengths)} rows; one call carries {MAX_STEP_TOKENS}")
        prompt = None if prompts_BxPxE is None else DeepPrompt(prompts_BxPxE, span.start)
        groups = _grouped(lengths, self._rows_of_a_call(span, sum(lengths)))
        pieces = hidden_TxE.detach().split([sum(group) for group in groups])
        done = self._each(lambda index: self._forward(span, groups[index], pieces[index], prompt, keep), len(groups))
        return torch.cat([out for out, _ in done]), [trail for _, trail in done]

    def backward(
        self, trails: Sequence[Trail], gradient_TxE: torch.Tensor, prompts_BxPxE: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients with respect to the rows [T, E] and to the prompts [B, P, E], of what has this gradient with respect to
        the rows that left the last block. Raises what `forward` raises."""
        start = trails[0].parts[0].hop.start
        prompt = None if prompts_BxPxE is None else DeepPrompt(prompts_BxPxE, start)
        pieces = gradient_TxE.detach().split([sum(trail.lengths) for trail in trails])
        done = self._each(lambda index: self._backward(trails[index], pieces[index], prompt), len(trails))
        if prompts_BxPxE is None:
            return torch.cat([rows for rows, _ in done]), None
        of_prompts = torch.stack([soft for _, soft in done if soft is not None]).sum(0)
        return torch.cat([rows for rows, _ in done]), of_prompts.to(prompts_BxPxE)

    def _rows_of_a_call(self, span: Span, rows: int) -> int:
        """At most: as many as the configuration says through one server; through several, so few that all of them have work most of
        the time, and yet enough that a backward's widened weights are worth it."""
        most = self.servers.config.call_rows
        servers = len(self.servers.way(span).hops)
        return most if servers == 1 else min(most, max(_LEAST_ROWS, rows // (_CALLS * servers)))

    def _each(self, work: Callable[[int], _Done], count: int) -> list[_Done]:
        return [work(0)] if count == 1 else list(self._threads.map(work, range(count)))

    def _forward(
        self, span: Span, lengths: tuple[int, ...], hidden_TxE: torch.Tensor, prompt: DeepPrompt | None, keep: bool
    ) -> tuple[torch.Tensor, Trail]:
        servers, parts, entered = self.servers, list[CallPart](), hidden_TxE
        retries, quality = Retries(servers), None
        at = span.start
        while at < span.end:
            taken = servers.take(Span(at, span.end))
            try:
                if parts and taken.quality != quality:  # what is left of the way is of another one: take that from the first block on
                    at, hidden_TxE = span.start, entered
                    parts.clear()
                    continue
                quality = taken.quality
                for hop in taken.hops:
                    call = servers.number()
                    frame = _Call(call, hop, lengths, prompt)
                    left = self._ask(frame.forward(self._array(hidden_TxE), keep=keep), frame, sum(lengths), hidden_TxE)
                    parts.append(CallPart(hop, hidden_TxE, call if keep else 0))
                    hidden_TxE, at = left, hop.end
            except (Fault, Declined) as error:
                retries.on_failure(error)
            finally:
                servers.give_back(taken)
        return hidden_TxE, Trail(lengths, tuple(parts), quality)

    def _backward(self, trail: Trail, gradient_TxE: torch.Tensor, prompt: DeepPrompt | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        servers, parts, given = self.servers, list(trail.parts), gradient_TxE
        of_prompts: list[torch.Tensor] = []
        retries = Retries(servers)
        while parts:
            part = parts[-1]
            call = _Call(servers.number(), part.hop, trail.lengths, prompt)
            gradient_TxE = gradient_TxE.to(part.entered)
            rows, of_prompt = sum(trail.lengths), 0 if prompt is None else prompt.tokens * (part.hop.end - part.hop.start)
            sent = gradient_TxE if part.call else torch.cat([part.entered, gradient_TxE])
            try:
                gradients = self._ask(call.backward(self._array(sent), kept=part.call), call, rows + of_prompt, part.entered)
            except Forgot:
                parts[-1] = replace(part, call=0)
                continue
            except (Fault, Declined) as error:
                retries.on_failure(error)
                if isinstance(error, Fault) or servers.goes_around(error.peer):
                    again = self._again(part, trail, prompt)
                    if again.quality == trail.quality:
                        parts[-1:] = again.parts
                    else:  # no gradient is made of two qualities
                        trail = self._forward(_span(trail.parts), trail.lengths, trail.parts[0].entered, prompt, True)[1]
                        parts, gradient_TxE = list(trail.parts), given
                        of_prompts.clear()
                continue
            gradient_TxE = gradients[:rows]
            if prompt is not None:
                of_prompts.append(gradients[rows:].float().view(-1, prompt.tokens, gradients.shape[1]))
            parts.pop()
        return gradient_TxE, torch.cat(of_prompts[::-1]) if of_prompts else None

    def _again(self, part: CallPart, trail: Trail, prompt: DeepPrompt | None) -> Trail:
        """The same blocks at the servers that are to be taken now; where these are several, what enters each is computed."""
        span = _span((part,))
        way = self.servers.way(span)
        if len(way.hops) == 1 or way.quality != trail.quality:
            return Trail(trail.lengths, tuple(CallPart(hop, part.entered) for hop in way.hops), way.quality)
        return self._forward(span, trail.lengths, part.entered, prompt, True)[1]

    def _array(self, rows: torch.Tensor) -> Array:
        return to_array(rows, self.servers.config.wire_dtype or wire_dtype_of(rows.dtype))

    def _ask(self, frame: ForwardFrame | BackwardFrame, call: _Call, expected: int, like: torch.Tensor) -> torch.Tensor:
        """The rows that the server answers, as many as are expected, in the dtype and on the device of others.

        Raises `Fault`, `Declined`, and `Forgot` for activations that it keeps no more.
        """
        servers, hop = self.servers, call.hop
        for given_again in (False, True):
            if call.prompt is not None:
                servers.given.give(call.prompt, (hop,))
            with open_mailbox(servers, str(call.number)) as mailbox:
                mailbox.open_to((hop.peer,), room_of(expected, like.shape[1]))
                servers.network.send(hop.peer, frame)
                try:
                    _, answer = mailbox.wait((hop.peer,))
                except Forgot as error:
                    if not isinstance(error.error, PromptNeeded):
                        if isinstance(frame, BackwardFrame) and frame.kept:
                            raise
                        raise Fault(hop.peer, ProtocolError("it says that it forgot what it was not asked to keep")) from error
                    servers.given.lose(hop.peer)
                    if given_again:
                        raise Fault(hop.peer, ProtocolError("it was sent the soft prompt twice, and says that it lacks it")) from error
                    continue
            if not isinstance(answer, ResultFrame):
                raise Fault(hop.peer, ProtocolError("it answered a call as if it were a session"))
            result = checked(answer.hidden, (expected, like.shape[1]), hop.peer)
            servers.bans.forgive(hop.peer)
            return result.to(like)
        raise AssertionError("the second time returns or raises")


@dataclass(frozen=True, slots=True)
class _Call:
    number: int
    hop: Hop
    lengths: tuple[int, ...]
    prompt: DeepPrompt | None

    def forward(self, rows: Array, *, keep: bool) -> ForwardFrame:
        return ForwardFrame(self.number, self.hop.start, self.hop.end, self.lengths, rows, prompt=self._name, keep=keep)

    def backward(self, rows: Array, *, kept: int) -> BackwardFrame:
        return BackwardFrame(self.number, self.hop.start, self.hop.end, self.lengths, rows, prompt=self._name, kept=kept)

    @property
    def _name(self) -> PromptName | None:
        return None if self.prompt is None else self.prompt.name


def _span(parts: Sequence[CallPart]) -> Span:
    return Span(parts[0].hop.start, parts[-1].hop.end)


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


def room_of(rows: int, width: int) -> int:
    """Bytes of so many rows in the widest dtype that they travel in."""
    return 4 * rows * width


def _grouped(lengths: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Neighbouring sequences of at most so many rows together; a longer one goes alone."""
    groups: list[list[int]] = [[]]
    for length in lengths:
        if groups[-1] and sum(groups[-1]) + length > most:
            groups.append([])
        groups[-1].append(length)
    return [tuple(group) for group in groups]
