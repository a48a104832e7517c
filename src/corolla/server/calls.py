"""The hidden states' way without a session, at a server: forward and backward calls in, rows and gradients out.

They are computed in between the steps of sessions, in the order of their arrival, a piece at a time (`engine.calls`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from corolla.engine.activations import ActivationLimits
from corolla.engine.budgets import Ledger
from corolla.engine.call_handler import CallCounters, CallHandler
from corolla.engine.engine import Engine
from corolla.errors import Busy, CorollaError, InvalidSetting, NetworkError, PromptTooLong
from corolla.messages import Array, BackwardFrame, FailedFrame, ForwardFrame, HopTiming, ResultFrame, WireMessage
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.convert import failed_of, to_call
from corolla.types import Span

_RECENTLY = 300.0  # seconds
_OVERHEAD = 4096  # bytes of a call beside its rows


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsConfig:
    rows: int = 8192  # of all sequences of one call; its backward holds as many for each block
    waiting_per_peer: int = 4  # calls, the one that is computed among them; one more is Busy
    waiting: int = 16  # of all peers; calls of a single row, by which servers are probed, have as many places of their own
    retry_after: float = 1.0  # seconds, told to who is turned away


@dataclass(slots=True, eq=False)
class _Call:
    sender: str
    frame: ForwardFrame | BackwardFrame
    arrived: float = field(default_factory=time.perf_counter)
    dropped: bool = False

    @property
    def size(self) -> int:
        """Bytes that it takes while it waits."""
        return _OVERHEAD + self.frame.hidden.nbytes

    @property
    def probes(self) -> bool:
        return self.frame.rows == 1


class CallService:
    """Takes calls from any thread; `send` is used on the engine's thread too.

    Args:
        me: this server's id, which its answers name.
    """

    def __init__(self, engine: Engine, send: Callable[[str, WireMessage], None], *, me: str, config: CallsConfig | None = None) -> None:
        self._engine, self._send, self._me = engine, send, me
        self.config = config or CallsConfig()
        budgets = engine.budgets
        self._answering = CallHandler(engine.model, engine.prompts, ActivationLimits(size=budgets.activations))
        self._ledger = Ledger(budgets.calls, budgets.calls // 4, self.config.retry_after)
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._came: dict[str, float] = {}  # when a peer's last call did

    @property
    def callers(self) -> set[str]:
        """Peers that called lately, and may call again."""
        with self._lock:
            since = time.monotonic() - _RECENTLY
            self._came = {peer: came for peer, came in self._came.items() if came > since}
            return set(self._came)

    @property
    def counters(self) -> CallCounters:
        """What happened since the server was made."""
        return self._answering.counters

    @property
    def waiting(self) -> int:
        """Calls that are not answered, the one that is computed among them."""
        return len(self._waiting)

    @property
    def kept(self) -> int:
        """Forwards whose activations are kept for a backward."""
        return len(self._answering.kept)

    def receive(self, sender: str, frame: ForwardFrame | BackwardFrame) -> None:
        """Answered, now or later, by a `ResultFrame` or by a `FailedFrame` with one of

        - `Busy`: too many calls or bytes of them wait, of this peer or of all.
        - `InvalidSetting`, `PromptTooLong`: the call can never be computed here, or not with these values.
        - `ServerFault`: computing it failed. `NetworkError`: these blocks are not held here.
        - `PromptNeeded`, `ActivationsGone`: more has to be sent.
        """
        call = _Call(sender, frame)
        try:
            self._check(frame)
            self._admit(call)
        except CorollaError as error:
            self._send(sender, self._failed(call, error))
            return
        try:
            self._engine.call(self._steps(call), lambda error: self._answer(call, self._failed(call, error)), call.sender)
        except CorollaError as error:  # the engine has ended
            self._answer(call, self._failed(call, error))

    def lose(self, peer: str) -> None:
        """The peer is gone: its calls are dropped, the one that is computed at its next piece, and what was kept for it."""
        self._answering.kept.lose(peer)
        with self._lock:
            self._came.pop(peer, None)
            for call in self._waiting:
                if call.sender == peer:
                    call.dropped = True
                    self._ledger.give_back(peer, call.size)
            self._waiting = [call for call in self._waiting if not call.dropped]

    def _check(self, frame: ForwardFrame | BackwardFrame) -> None:
        arch, own = self._engine.model.arch, self._engine.model.span
        if not own.start <= frame.start < frame.end <= own.end:
            blocks = Span(frame.start, frame.end)
            if frame.end > arch.blocks:
                raise InvalidSetting("blocks", f"{blocks} are not among the {arch.blocks} of this model")
            raise NetworkError(f"this server holds blocks {own} and not {blocks}: it may have moved since its record was read")
        if frame.hidden.shape[1] != arch.hidden:
            raise InvalidSetting("hidden", f"rows of {frame.hidden.shape[1]} values came, and the model's have {arch.hidden}")
        if frame.rows > self.config.rows:
            raise InvalidSetting(
                "lengths", f"{frame.rows} rows in one call, and this server takes {self.config.rows}: send fewer sequences"
            )
        if max(frame.lengths) > arch.context_length:
            raise PromptTooLong(max(frame.lengths), arch.context_length)

    def _admit(self, call: _Call) -> None:
        with self._lock:
            alike = [other for other in self._waiting if other.probes == call.probes]
            of_sender = sum(other.sender == call.sender for other in alike)
            if of_sender >= self.config.waiting_per_peer or len(alike) >= self.config.waiting:
                raise Busy(self.config.retry_after)
            self._ledger.take(call.sender, call.size)
            self._waiting.append(call)
            self._came[call.sender] = time.monotonic()

    # On the engine's thread from here on.

    def _steps(self, call: _Call) -> Iterator[None]:
        """What `Engine.call` takes."""
        queued, computed = time.perf_counter() - call.arrived, 0.0
        work = self._compute(call)
        while not call.dropped:
            began = time.perf_counter()
            try:
                next(work)
            except StopIteration as done:
                timing = HopTiming(self._me, queued, computed, 0.0)
                self._answer(call, ResultFrame(call.frame.call, done.value, (timing,)))
                return
            except CorollaError as error:
                self._answer(call, self._failed(call, error))
                return
            computed += time.perf_counter() - began
            yield
        work.close()

    def _compute(self, call: _Call) -> Generator[None, None, Array]:
        """What a call is answered with, in the dtype in which it came."""
        frame = call.frame
        result = yield from self._answering.answer(to_call(frame, call.sender), from_array(frame.hidden))
        return to_array(result, frame.hidden.dtype)

    def _answer(self, call: _Call, answer: ResultFrame | FailedFrame) -> None:
        with self._lock:
            if call.dropped:
                return
            self._waiting.remove(call)
            self._ledger.give_back(call.sender, call.size)
        self._send(call.sender, answer)

    def _failed(self, call: _Call, error: CorollaError) -> FailedFrame:
        return failed_of(error, str(call.frame.call), 0, peer=self._me)
