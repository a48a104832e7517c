"""A span offered to the swarm: steps come in, go through the engine, and leave for the next server of their route.

The tokens' way: the first server embeds, hidden states go from server to server, the last one samples. A sampled token goes
to the client and, at the same time, straight back to the first server (the ring): the client is not on the critical path.

The hidden states' way of a session is the same with hidden states at both ends. Without a session see `calls`.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass

import msgspec
import torch

from corolla.engine.engine import Engine
from corolla.errors import Busy, CallerError, CorollaError, InvalidSetting, NetworkError, ServerFault, Unauthorized
from corolla.server.calls import Calls
from corolla.swarm.convert import (
    failed_of,
    from_reply,
    from_step,
    to_adapter_part,
    to_message,
    to_prompt_name,
    to_prompt_part,
    to_settings,
    to_step,
    to_timings,
)
from corolla.swarm.network import Network
from corolla.swarm.pings import RoundTrips
from corolla.swarm.wire import (
    AdapterFrame,
    Ask,
    AskCounters,
    BackwardFrame,
    CancelFrame,
    CloseFrame,
    Counters,
    FailedFrame,
    ForwardFrame,
    Hop,
    Leaving,
    Ping,
    Pong,
    PromptFrame,
    StepFrame,
    Whereabouts,
    WireDtype,
    WireMessage,
)
from corolla.types import Close, Gap, GenerationSettings, Hidden, HopTiming, PromptName, Reply, Span, Step, Token

log = logging.getLogger(__name__)
_REMEMBERED = 4096  # closed sessions, whose late steps are refused


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanServerConfig:
    """`wire_dtype` is that of the hidden states sent on: the model's own where the answer must not depend on the route."""

    wire_dtype: WireDtype
    sessions: int = 4096  # open at once, idle ones among them; one more is Busy
    sessions_per_client: int = 1024
    sessions_per_server: int = 2048  # that one server before this one brings
    retry_after: float = 1.0  # seconds, told to who is turned away


@dataclass(slots=True)
class NodeCounters:
    """What happened since the server was made."""

    pushes: int = 0  # of hidden states to the next server
    ring_steps: int = 0  # tokens that went from the last server straight to the first
    refused: int = 0  # steps answered with an error


@dataclass(slots=True, eq=False)
class _Way:
    """How a session goes on from here, and what else came with its first step and need not come again."""

    generation: int
    route: tuple[Hop, ...]
    hop: int
    client: str
    adapter: str
    asked: int
    timed: bool
    wants_hidden: bool
    settings: GenerationSettings | None = None
    prompt: PromptName | None = None

    @property
    def span(self) -> Span:
        """The blocks to compute here."""
        here = self.route[self.hop]
        return Span(here.start, here.end)

    @property
    def before(self) -> str:
        """Who sends steps here: the client or the server before."""
        return self.client if self.hop == 0 else self.route[self.hop - 1].peer

    @property
    def sends_here(self) -> str:
        """Who sends the tokens of an answer here: the server before, round the ring."""
        return self.route[self.hop - 1].peer

    @property
    def last(self) -> bool:
        return self.hop == len(self.route) - 1


@dataclass(slots=True, eq=False)
class _UnderWay:
    """A step in the engine. `since` is when it came, or its last reply went."""

    way: _Way
    step: Step
    tells_way: bool  # whether the next server has to be told the way
    since: float
    timings: tuple[HopTiming, ...]


class SpanServer:
    """Serves one engine's span over a network until `close`, or until another one listens on that network."""

    def __init__(self, engine: Engine, network: Network, config: SpanServerConfig) -> None:
        self._engine, self._network, self._config = engine, network, config
        self._ways: dict[str, _Way] = {}
        self._closed: dict[str, int] = {}  # the generations that sessions ended with, the latest of them
        self._leaving = False
        self.counters = NodeCounters()
        self.round_trips = RoundTrips(self._send)
        self._calls = Calls(engine, self._send, me=network.me)
        self._held: list[tuple[str, WireMessage]] = []  # replies of the engine's turn
        engine.after_turn = self._send_held
        network.listen(self._receive, self._lose)

    @property
    def sessions(self) -> int:
        """How many sessions are open here, idle ones among them."""
        return len(self._ways)

    def leave(self) -> None:
        """Take no new sessions, and ask those that are open, and those who call, to go on elsewhere; they are served until they do."""
        self._leaving = True
        for client in {way.client for way in list(self._ways.values())} | self._calls.callers:
            self._send(client, Leaving())

    def stay(self) -> None:
        """Take sessions again after `leave`."""
        self._leaving = False

    def stop(self) -> None:
        """Stop the engine; the network stays."""
        self._engine.stop()

    def close(self) -> None:
        """Leave the network and stop the engine."""
        self._network.close()
        self._engine.stop()

    # On the network's thread from here on.

    def _receive(self, sender: str, message: WireMessage) -> None:
        if isinstance(message, StepFrame):
            self._step(sender, message)
        elif isinstance(message, (ForwardFrame, BackwardFrame)):
            self._calls.receive(sender, message)
        elif isinstance(message, (CancelFrame, CloseFrame)):
            self._end(sender, message)
        elif isinstance(message, (PromptFrame, AdapterFrame)):
            self._keep(sender, message)
        elif isinstance(message, FailedFrame):
            self._pass_back(sender, message)
        elif isinstance(message, Ping):
            if self._engine.alive:
                self._send(sender, Pong(message.nonce))
        elif isinstance(message, Pong):
            self.round_trips.answered(sender, message)
        elif isinstance(message, Ask):
            cached, pending = self._engine.whereabouts(message.session, message.generation)
            self._send(sender, Whereabouts(message.session, message.generation, cached, pending))
        elif isinstance(message, AskCounters):
            counts = asdict(self.counters) | asdict(self._calls.counters) | asdict(self._engine.counters) | dict(self._network.counts)
            self._send(sender, Counters({name: int(count) for name, count in counts.items()}))

    def _lose(self, peer: str) -> None:
        """The sessions of a client that is gone are closed; of a server that is gone, its sessions' clients are told."""
        self.round_trips.forget(peer)
        self._calls.lose(peer)
        self._engine.prompts.lose(peer)
        for session, way in list(self._ways.items()):
            if way.client == peer:
                del self._ways[session]
                self._engine.receive(Close(session))
            elif any(hop.peer == peer for hop in way.route):
                gone = NetworkError("the servers before or behind it cannot reach it")
                self._send(way.client, failed_of(gone, session, way.generation, peer=peer))

    def _end(self, sender: str, frame: CancelFrame | CloseFrame) -> None:
        way = self._ways.get(frame.session)
        if way is None or (sender != way.client and all(sender != hop.peer for hop in way.route)):
            return
        self._engine.receive(to_message(frame))
        if isinstance(frame, CloseFrame) and (frame.generation is None or way.generation <= frame.generation):
            del self._ways[frame.session]
            self._closed[frame.session] = way.generation
            if len(self._closed) > _REMEMBERED:
                del self._closed[next(iter(self._closed))]

    def _keep(self, sender: str, frame: PromptFrame | AdapterFrame) -> None:
        """A prompt that is refused is asked for again by the step that names it, and then its sender gives up; where an adapter was
        refused, the step is."""
        try:
            if isinstance(frame, PromptFrame):
                self._engine.prompts.put(sender, to_prompt_part(frame))
            else:
                self._engine.adapters.put(sender, to_adapter_part(frame))
        except CorollaError as error:
            log.info("what came for a session was refused: %s", error, extra={"peer": sender})

    def _pass_back(self, sender: str, failed: FailedFrame) -> None:
        """A neighbour that has never heard of the session, or knows it no more, does not know its client either."""
        way = self._ways.get(failed.session)
        if way is not None and way.generation == failed.generation and any(sender == hop.peer for hop in way.route):
            self._send(way.client, msgspec.structs.replace(failed, peer=sender))

    def _step(self, sender: str, frame: StepFrame) -> None:
        # Until the step is admitted nobody but its sender is answered.
        client, blamed, generation = sender, self._network.me, frame.generation
        known = self._ways.get(frame.session)
        if known is not None and not frame.route and frame.generation < known.generation:
            return  # late
        try:
            way = self._way(sender, frame, known)
            client = way.client
            blamed, generation = sender, way.generation
            if frame.hidden is not None:
                self._check_shape(frame.start, frame.hidden.shape, from_client=way.hop == 0)
            step = to_step(frame)
            self._check(sender, frame, step, way)
            blamed = self._network.me
            # What a step without a way leaves out came with the first one.
            step = Step(
                step.session,
                step.start,
                step.payload,
                step.generation,
                way.settings,
                way.adapter,
                step.tokens,
                way.span,
                way.asked,
                step.more,
                way.wants_hidden,
                way.prompt,
                way.client,
            )
            under_way = _UnderWay(way, step, bool(frame.route), time.perf_counter(), to_timings(frame.timings))
            self._engine.receive(step, lambda reply: self._deliver(under_way, reply))
        except CorollaError as error:
            if known is None:
                self._ways.pop(frame.session, None)
            self.counters.refused += 1
            log.info("a step was refused: %s", error, extra={"session": frame.session, "peer": sender})
            self._send(client, failed_of(error, frame.session, generation, peer=blamed))

    def _way(self, sender: str, frame: StepFrame, known: _Way | None) -> _Way:
        """The way of a step that may be taken in; remembered if the step brings it."""
        if frame.route:
            way = _Way(
                frame.generation,
                frame.route,
                frame.hop,
                frame.client or sender,
                frame.adapter,
                frame.asked,
                frame.timed,
                wants_hidden=frame.output == "hidden",
                settings=None if frame.settings is None else to_settings(frame.settings),
                prompt=to_prompt_name(frame.prompt),
            )
            self._admit(sender, frame.session, way, known)
            if way.timed:
                self.round_trips.ask({way.before, way.sends_here} - self.round_trips.seconds.keys())
            self._ways[frame.session] = way
            return way
        if known is None:
            raise ServerFault("this server does not know the session's route")
        if sender not in (known.before, known.route[-1].peer):
            raise Unauthorized(f"peer {sender} is not on the session's route")
        return known

    def _admit(self, sender: str, session: str, way: _Way, known: _Way | None) -> None:
        if way.route[way.hop].peer != self._network.me or sender != way.before:
            raise Unauthorized("the step did not come the way that it names")
        if len({hop.peer for hop in way.route}) < len(way.route) or len(way.route) > self._engine.model.arch.blocks:
            raise InvalidSetting("route", "a route goes to each server once, and to no more servers than the model has blocks")
        own, blocks = self._engine.model.span, self._engine.model.arch.blocks
        if not (own.start <= way.span.start and way.span.end <= own.end):
            if way.span.end > blocks:
                raise InvalidSetting("route", f"blocks {way.span} are not among the {blocks} of this model")
            raise NetworkError(f"this server holds blocks {own} and not {way.span}: it may have moved since its record was read")
        if known is not None:
            if way.client != known.client:
                raise Unauthorized("the session belongs to another client")
            if way.generation < known.generation:
                raise ServerFault("a later step of the session came before this one")
            return
        if self._closed.get(session, -1) >= way.generation:
            raise Unauthorized("the session was closed while the step was on its way")
        if self._leaving:
            raise NetworkError("this server is leaving, and takes no new sessions")
        # Counted by who brings them, too: a peer that names another's client takes none of its places.
        of_client = sum((other.client, other.before) == (way.client, way.before) for other in self._ways.values())
        of_server = sum(other.before == way.before for other in self._ways.values())
        config = self._config
        if len(self._ways) >= config.sessions or of_client >= config.sessions_per_client or of_server >= config.sessions_per_server:
            raise Busy(config.retry_after)

    def _check_shape(self, start: int, shape: tuple[int, int], *, from_client: bool) -> None:
        """Before the rows themselves are touched. Raises like `_check`."""
        arch, (rows, values) = self._engine.model.arch, shape
        problem = ""
        if values != arch.hidden:
            problem = f"rows of {values} values came, and this model's have {arch.hidden}"
        elif start + rows > arch.context_length:
            problem = f"positions came that are outside a context of {arch.context_length}"
        if problem:
            raise InvalidSetting("hidden", problem) if from_client else ServerFault(problem)

    def _check(self, sender: str, frame: StepFrame, step: Step, way: _Way) -> None:
        """Raises `ServerFault` for what no honest server sends, and `InvalidSetting` for rows of a client that no block takes."""
        problem = self._problem_of_rows(step, way)
        if way.hop == 0 and sender == way.client:
            if problem:
                raise InvalidSetting("hidden", problem)
            return
        arch = self._engine.model.arch
        if frame.generation != way.generation:
            problem = f"a step of generation {frame.generation} came, and the session is at {way.generation}"
        elif not frame.tokens and not way.wants_hidden:
            problem = "a step without token ids came"
        elif not all(0 <= token < arch.vocabulary for token in frame.tokens):
            problem = f"token ids came that are outside a vocabulary of {arch.vocabulary}"
        if problem:
            raise ServerFault(problem)

    def _problem_of_rows(self, step: Step, way: _Way) -> str | None:
        if not isinstance(step.payload, torch.Tensor):
            return "no hidden states came" if way.hop else None
        # One operation where all is well: NaN and infinity stay in a sum.
        sound = math.isfinite(step.payload.sum(dtype=torch.float32)) or bool(step.payload.isfinite().all())
        return None if sound else "hidden states came that are NaN or infinite"

    # On the engine's thread from here on.

    def _deliver(self, under_way: _UnderWay, reply: Reply) -> None:
        try:
            self._reply(under_way, reply)
        except CorollaError as error:  # what cannot be sent in the wire dtype, say
            self._hold(under_way.way.client, failed_of(error, reply.session, reply.generation, peer=self._network.me))

    def _reply(self, under_way: _UnderWay, reply: Reply) -> None:
        way = under_way.way
        timings = self._timings(under_way) if way.timed else ()
        if isinstance(reply, Gap) and way.hop and reply.have and not under_way.tells_way:
            jump = ServerFault(f"rows from position {under_way.step.start} came, and those before had ended at {reply.have}")
            self._hold(way.client, failed_of(jump, reply.session, way.generation, peer=way.before))
            return
        if isinstance(reply, Hidden) and not way.last:
            self._pass_on(under_way, reply, timings)
            return
        if isinstance(reply, Token) and len(way.route) > 1:
            self._close_ring(way, reply)
        self._hold(way.client, from_reply(reply, peer=self._network.me, wire_dtype=self._config.wire_dtype, timings=timings))

    def _pass_on(self, under_way: _UnderWay, reply: Hidden, timings: tuple[HopTiming, ...]) -> None:
        """The rows that are computed so far go to the next server; it samples after the last of them."""
        way, step = under_way.way, under_way.step
        # The head samples after the last row, and needs to know of each whether it is scored.
        wanted = step.settings is not None and (reply.last or step.settings.prompt_logprobs)
        onward = Step(
            step.session,
            reply.start,
            reply.hidden,
            step.generation,
            step.settings if under_way.tells_way and wanted else None,
            step.adapter if under_way.tells_way else "",
            reply.tokens,
            asked=step.asked,
            more=not reply.last,
            wants_hidden=step.wants_hidden,
            prompt=step.prompt,
        )
        hop = way.hop + 1
        if under_way.tells_way:
            frame = from_step(
                onward,
                wire_dtype=self._config.wire_dtype,
                route=way.route,
                hop=hop,
                client=way.client,
                timed=way.timed,
                timings=timings,
            )
        else:
            frame = from_step(onward, wire_dtype=self._config.wire_dtype, timings=timings)
        self.counters.pushes += 1
        self._hold(way.route[hop].peer, frame)

    def _close_ring(self, way: _Way, token: Token) -> None:
        """The token goes on where the route begins; after the last one the other servers are told that the answer has ended."""
        if token.finish is None:
            self.counters.ring_steps += 1
            self._hold(way.route[0].peer, StepFrame(token.session, token.generation, token.position, (token.token_id,)))
        else:
            for hop in way.route[:-1]:
                self._hold(hop.peer, CancelFrame(token.session, token.generation))

    def _timings(self, under_way: _UnderWay) -> tuple[HopTiming, ...]:
        now, compute = time.perf_counter(), self._engine.forward_seconds
        queue = max(0.0, now - under_way.since - compute)
        under_way.since = now
        transfer = self.round_trips.of(under_way.way.sends_here) / 2
        return (*under_way.timings, HopTiming(self._network.me, queue, compute, transfer))

    def _hold(self, peer: str, message: WireMessage) -> None:
        """Send it with the other replies of the engine's turn: what was computed together goes on together."""
        self._held.append((peer, message))

    def _send_held(self) -> None:
        held, self._held = self._held, []
        try:
            if held:
                self._network.send_all(held)
        except NetworkError as error:  # this server is leaving
            log.info("replies were not sent: %s", error)
        except CallerError:  # one of them, which must not take the others along
            for peer, message in held:
                self._send(peer, message)

    def _send(self, peer: str, message: WireMessage) -> None:
        try:
            self._network.send(peer, message)
        except (NetworkError, CallerError) as error:  # this server is leaving, or no frame holds what a client wanted sent
            log.info("a message was not sent: %s", error, extra={"peer": peer})
