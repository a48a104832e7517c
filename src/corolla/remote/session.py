"""An inference session on hidden states: servers keep the caches of a batch's sequences, the client keeps what went in.

Each sequence is a session of its own at the servers, and every step names the position it starts at. A server that fails is
replaced by sending a sequence's rows again along a new route; going back, and reordering beams, need nothing else either.

Legend: S sequences, N rows of one with its padding, L columns so far, T rows of one without, E hidden, B blocks, P soft tokens.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch

from corolla.errors import InvalidSetting, NetworkError, PromptTooLong, ProtocolError
from corolla.messages import MAX_STEP_TOKENS, Close, Gap, HiddenFrame, Hop, StepFrame
from corolla.remote.calls import RemoteCalls, checked, room_of, wire_dtype_of
from corolla.remote.incoming import Declined, Fault, Forgot, StandsStill
from corolla.remote.mailbox import Mailbox, open_mailbox
from corolla.remote.prompt_upload import DeepPrompt
from corolla.remote.retries import Retries
from corolla.remote.servers import Servers
from corolla.swarm.arrays import to_array
from corolla.types import Span

_MOST_GAPS = 16  # in one step: a server that is short of room evicts a session now and then, not again and again


class InferenceSession:
    """Steps of a batch through the blocks of `span`; a context manager, for one thread.

    Args:
        max_length: columns that the session may come to, padding among them.
        prompts: soft tokens [B, P, E], added to the first P rows of every sequence at each block's input; as they are now.
        prefix: how many of the first columns are soft tokens, for `generate`.

    Attributes:
        output_ids: the tokens [S, L - prefix] or more that `generate` has put in and got out; None before.
    """

    def __init__(self, calls: RemoteCalls, span: Span, *, max_length: int, prompts: torch.Tensor | None = None, prefix: int = 0) -> None:
        self.span, self.max_length, self.prefix = span, max_length, prefix
        self.output_ids: torch.Tensor | None = None
        self._calls = calls
        self._prompt = None if prompts is None else DeepPrompt(prompts, span.start)
        self._sequences: list[_Sequence] = []
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._closed = False

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let the servers forget it. Closing twice is no error."""
        self._closed = True
        for sequence in self._sequences:
            sequence.leave()

    @property
    def position(self) -> int:
        """Columns so far, soft tokens among them; set it to go back to an earlier one. From 0 on there may be another number of
        sequences.

        Raises `InvalidSetting` for one that was not reached.
        """
        return self._mask.shape[1]

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise InvalidSetting("position", f"{position} is not from 0 to {self.position}, where the session is")
        if 0 < position < self.prefix:
            raise InvalidSetting("position", f"{position} lies among the {self.prefix} soft tokens: go back to 0, or less far")
        if position == 0:
            for sequence in self._sequences:
                sequence.leave()
            self._sequences, self._mask, self.output_ids = [], torch.zeros(0, 0, dtype=torch.bool), None
            return
        self._mask = self._mask[:, :position]
        for sequence, rows in zip(self._sequences, self._mask.sum(1).tolist(), strict=True):
            sequence.cut(rows)
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, : position - self.prefix]

    @property
    def sequences(self) -> int:
        """How many there are; 0 before the first step."""
        return len(self._sequences)

    @property
    def attention_mask(self) -> torch.Tensor:
        """[S, L], false at padding."""
        return self._mask

    def step(self, hidden_SxNxE: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden states [S, N, E] that leave the last block, of the next N columns; zeros at padding.

        Args:
            attention_mask: [S, N], 0 where there is padding: it is not sent, and counts no positions.

        When it raises, the session is where it was before:
            InvalidSetting: a shape that does not fit, or the session is closed.
            PromptTooLong: the step would go beyond `max_length`.
            NoRoute, ServerFault, NetworkError, CallerError: as `Calls.forward` raises them.
        """
        new = self._checked(hidden_SxNxE, attention_mask)
        if not self._sequences:
            self._sequences = [self._new() for _ in hidden_SxNxE]
            self._mask = new[:, :0]
        rows = [hidden[kept].detach() for hidden, kept in zip(hidden_SxNxE, new.to(hidden_SxNxE.device), strict=True)]
        computed = self._computed(rows)
        for sequence, added in zip(self._sequences, rows, strict=True):
            sequence.add(added)
        self._mask = torch.cat([self._mask, new], 1)
        out = torch.zeros_like(hidden_SxNxE, requires_grad=False)
        out[new.to(out.device)] = torch.cat(computed)
        return out

    def reorder(self, indices: Sequence[int]) -> None:
        """Sequence i goes on from what sequence `indices[i]` has been given so far, as beams do.

        What two sequences have in common stays cached: only the rest is sent again, with the next step.
        """
        if any(not 0 <= index < len(self._sequences) for index in indices):
            raise InvalidSetting("indices", f"{list(indices)} are not among the session's {len(self._sequences)} sequences")
        before = self._sequences
        histories = [sequence.rows(0) for sequence in before]
        left = [sequence for index, sequence in enumerate(before) if index not in indices]
        taken: set[int] = set()
        after: list[_Sequence] = []
        for index in indices:
            if index not in taken:
                taken.add(index)
                after.append(before[index])
            else:
                sequence = left.pop() if left else self._new()
                sequence.become(histories[index])
                after.append(sequence)
        for sequence in left:
            sequence.leave()
        self._sequences, self._mask = after, self._mask[list(indices)]

    def _new(self) -> _Sequence:
        return _Sequence(self._calls.servers, self.span, self._prompt)

    def _checked(self, hidden_SxNxE: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Which of the new columns are rows [S, N]."""
        if self._closed:
            raise InvalidSetting("session", "it is closed: open another one")
        if hidden_SxNxE.ndim != 3 or (self._sequences and hidden_SxNxE.shape[0] != len(self._sequences)):
            sequences = len(self._sequences) or "sequences"
            raise InvalidSetting("hidden", f"hidden states come as [{sequences}, rows, hidden], not as {list(hidden_SxNxE.shape)}")
        columns = hidden_SxNxE.shape[:2]
        if self.position + columns[1] > self.max_length:
            raise PromptTooLong(self.position + columns[1], self.max_length)
        if attention_mask is None:
            return torch.ones(columns, dtype=torch.bool)
        if attention_mask.shape != columns:
            raise InvalidSetting("attention_mask", f"its shape {list(attention_mask.shape)} is not {list(columns)}")
        return attention_mask.to("cpu", torch.bool)

    def _computed(self, new: list[torch.Tensor]) -> list[torch.Tensor]:
        """All sequences' rows are sent before any answer is waited for."""
        servers = self._calls.servers
        with ExitStack() as open_mailboxes:
            turns = []
            for sequence, rows in zip(self._sequences, new, strict=True):
                if len(rows):
                    mailbox = open_mailboxes.enter_context(open_mailbox(servers, sequence.name))
                    turns.append(_Turn(servers, sequence, mailbox, rows))
            servers.network.send_all([message for turn in turns for message in turn.messages()])
            return [turn.finish() for turn in turns]


class _Sequence:
    """One sequence: a session at servers, and every row that went in. Servers have the first `cached` of them, as far as is known."""

    def __init__(self, servers: Servers, span: Span, prompt: DeepPrompt | None) -> None:
        self.name = uuid.uuid4().hex
        self.span, self.prompt = span, prompt
        self.generation = 0
        self.hops: tuple[Hop, ...] = ()
        self.cached = 0
        self._servers = servers
        self._pieces: list[torch.Tensor] = []

    @property
    def length(self) -> int:
        return sum(map(len, self._pieces))

    def rows(self, start: int) -> torch.Tensor:
        """All rows [T, E] from `start` on."""
        self._pieces = [torch.cat(self._pieces)] if self._pieces else []
        return self._pieces[0][start:] if self._pieces else torch.empty(0)

    def add(self, rows_TxE: torch.Tensor) -> None:
        """Rows that the servers have computed."""
        if len(rows_TxE):
            self._pieces.append(rows_TxE.clone())
        self.cached = self.length

    def cut(self, length: int) -> None:
        """Go back to so many rows."""
        if length < self.length:
            self._pieces = [self.rows(0)[:length]] if length else []
            self.cached = min(self.cached, length)

    def become(self, rows_TxE: torch.Tensor) -> None:
        """Go on from these rows instead."""
        common = 0
        own = self.rows(0)
        both = min(len(own), len(rows_TxE))
        if both:
            common = int((own[:both] == rows_TxE[:both]).all(1).long().cumprod(0).sum())
        self._pieces = [rows_TxE] if len(rows_TxE) else []
        self.cached = min(self.cached, common)

    def leave(self) -> None:
        """Let go of the route: its servers are told, as far as they hear."""
        hops, self.hops, self.cached = self.hops, (), 0
        for hop in hops:
            try:
                self._servers.network.send(hop.peer, Close(self.name, self.generation))
            except NetworkError:
                return


class _Turn:
    """A step of one sequence: its new rows [T, E], and whatever of the earlier ones the servers lack. `finish` it once its
    messages are sent."""

    def __init__(self, servers: Servers, sequence: _Sequence, mailbox: Mailbox, new_TxE: torch.Tensor) -> None:
        self._servers, self._sequence, self._mailbox, self._new = servers, sequence, mailbox, new_TxE
        self._retries = Retries(servers)
        self._gaps = 0
        self._start = 0

    def messages(self) -> list[tuple[str, StepFrame]]:
        """What is to be sent, by peer: a new generation, along a new route where there is none."""
        sequence, servers = self._sequence, self._servers
        if (other := servers.elsewhere(sequence.hops, sequence.span, self._end)) is not None:
            sequence.leave()
            sequence.hops = other
        sequence.hops = sequence.hops or servers.hops(sequence.span, self._end)
        sequence.generation += 1
        if sequence.prompt is not None:
            servers.given.give(sequence.prompt, sequence.hops)
        self._start = start = sequence.cached
        rows = self._new if start == sequence.length else torch.cat([sequence.rows(start), self._new])
        self._mailbox.open_to([hop.peer for hop in sequence.hops], room_of(*rows.shape))
        dtype = servers.config.wire_dtype or wire_dtype_of(rows.dtype)
        asked = int(time.time() * 1000)
        frames = []
        for first in range(0, len(rows), MAX_STEP_TOKENS):
            piece = rows[first : first + MAX_STEP_TOKENS]
            frame = StepFrame(
                sequence.name,
                sequence.generation,
                start + first,
                (),
                to_array(piece, dtype),
                route=sequence.hops,
                client=servers.network.me,
                asked=asked,
                more=first + len(piece) < len(rows),
                output="hidden",
                prompt=None if sequence.prompt is None else sequence.prompt.name,
                began=start if first else None,
            )
            frames.append((sequence.hops[0].peer, frame))
        return frames

    def finish(self) -> torch.Tensor:
        """What leaves the last block [T, E] of the new rows."""
        while True:
            try:
                try:
                    return self._collect()
                except Forgot as error:
                    self._servers.given.lose(error.peer)
                    self._bear_gap(error.peer)
                except StandsStill:
                    self._bear_gap(self._sequence.hops[-1].peer)
            except (Fault, Declined) as error:
                self._sequence.leave()
                self._retries.on_failure(error)
            self._servers.network.send_all(self.messages())

    @property
    def _end(self) -> int:
        return self._sequence.length + len(self._new)

    def _bear_gap(self, peer: str) -> None:
        """What was sent once has to be sent again. Raises `Fault` when that happens again and again."""
        self._gaps += 1
        if self._gaps > _MOST_GAPS:
            raise Fault(peer, ProtocolError("it asks for the same rows again and again"))

    def _collect(self) -> torch.Tensor:
        sequence, received = self._sequence, list[torch.Tensor]()
        at = self._start
        while at < self._end:
            peers = [hop.peer for hop in sequence.hops]
            sender, answer = self._mailbox.wait(peers, sequence.generation, sequence.name, self._end)
            if isinstance(answer, Gap):
                if answer.have >= self._end:
                    raise Fault(sender, ProtocolError(f"it lacks rows, and yet says that it has {answer.have} of {self._end}"))
                self._bear_gap(sender)
                sequence.cached = min(answer.have, self._start)  # behind that a later chunk got lost: all of them are sent again
                self._servers.network.send_all(self.messages())
                at, received = self._start, []
            elif isinstance(answer, HiddenFrame) and sender == peers[-1] and answer.start == at:
                rows = min(answer.hidden.shape[0], self._end - at)
                received.append(checked(answer.hidden, (rows, self._new.shape[1]), sender))
                at += rows
            else:
                raise Fault(sender, ProtocolError("it answered what nobody asked it for"))
        for hop in sequence.hops:
            self._servers.bans.forgive(hop.peer)
        return torch.cat(received)[-len(self._new) :].to(self._new)
