"""A span offered to the swarm: steps come in, go through the engine, and leave for the next server of their route.

The tokens' way: the first server embeds, hidden states go from server to server, the last one samples. A sampled token goes
to the client and, at the same time, straight back to the first server (the ring): the client is not on the critical path.

The hidden states' way of a session is the same with hidden states at both ends. Without a session see `calls`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace

import msgspec

from corolla.barrier import barrier
from corolla.engine.counters import coarse
from corolla.engine.engine import Engine
from corolla.errors import CallerError, CorollaError, NetworkError, ServerFault
from corolla.messages import (
    AdapterFrame,
    Ask,
    AskCounters,
    BackwardFrame,
    Cancel,
    Close,
    Counters,
    FailedFrame,
    ForwardFrame,
    Leaving,
    Ping,
    Pong,
    PromptFrame,
    StepFrame,
    Whereabouts,
    WireMessage,
)
from corolla.server.calls import CallService
from corolla.server.replies import InFlightStep, NodeCounters, ReplyRouter
from corolla.server.session_table import SessionRoute, SessionTable, SpanServerConfig
from corolla.server.validation import check_rows, check_shape
from corolla.swarm.convert import failed_of, to_adapter_part, to_prompt_part, to_step
from corolla.swarm.network import Network
from corolla.swarm.pings import RoundTrips
from corolla.swarm.probing import Probes

log = logging.getLogger(__name__)


class SpanServer:
    """Serves one engine's span over a network until `close`, or until another one listens on that network."""

    def __init__(self, engine: Engine, network: Network, config: SpanServerConfig, probes: Probes | None = None) -> None:
        self._engine, self._network = engine, network
        span, blocks = engine.model.span, engine.model.arch.blocks
        self._ways = SessionTable(network.me, span, blocks, config)
        self.counters = NodeCounters()
        self.round_trips = RoundTrips(self._send)
        self._probes = probes or Probes(self._send)
        self._calls = CallService(engine, self._send, me=network.me)
        self._onward = ReplyRouter(
            engine, network, self._send, wire_dtype=config.wire_dtype, counters=self.counters, round_trips=self.round_trips
        )
        engine.after_turn = self._onward.send_held
        network.listen(self._receive, self._lose)

    @property
    def sessions(self) -> int:
        """How many sessions are open here, idle ones among them."""
        return len(self._ways)

    @property
    def gauges(self) -> dict[str, int]:
        """What is held for clients now, by name: all of it is 0 when they are gone."""
        calls = {"calls_waiting": self._calls.waiting, "activations_kept": self._calls.kept}
        return {"sessions_open": self.sessions, **self._engine.gauges, **calls}

    def leave(self) -> None:
        """Take no new sessions, and ask those that are open, and those who call, to go on elsewhere; they are served until they do."""
        self._ways.leaving = True
        for client in self._ways.clients | self._calls.callers:
            self._send(client, Leaving())

    def stay(self) -> None:
        """Take sessions again after `leave`."""
        self._ways.leaving = False

    def stop(self) -> None:
        """Stop the engine; the network stays."""
        self._engine.stop()

    def close(self) -> None:
        """Leave the network and stop the engine."""
        self._network.close()
        self._engine.stop()

    # On the network's thread from here on.

    def _receive(self, sender: str, message: WireMessage) -> None:
        """A message that cannot be handled, which nobody expected, ends what it belongs to and nothing else."""
        with barrier("a server's message", lambda error: self._answer_unhandled(sender, message)):
            self._handle(sender, message)

    def _answer_unhandled(self, sender: str, message: WireMessage) -> None:
        fault = ServerFault("this server failed over the message")
        if isinstance(message, StepFrame):
            way, client = self._ways.get(message.session), sender
            if way is not None and sender == way.before:
                way.over, client = True, way.client
            self._send(client, failed_of(fault, message.session, message.generation, peer=self._network.me))
        elif isinstance(message, (ForwardFrame, BackwardFrame)):
            self._send(sender, failed_of(fault, str(message.call), 0, peer=self._network.me))

    def _handle(self, sender: str, message: WireMessage) -> None:
        self._probes.receive(sender, message)
        if isinstance(message, StepFrame):
            self._step(sender, message)
        elif isinstance(message, (ForwardFrame, BackwardFrame)):
            self._calls.receive(sender, message)
        elif isinstance(message, (Cancel, Close)):
            self._end(sender, message)
        elif isinstance(message, (PromptFrame, AdapterFrame)):
            self._keep(sender, message)
        elif isinstance(message, FailedFrame):
            self._pass_back(sender, message)
        elif isinstance(message, Ping):
            self._send(sender, Pong(message.nonce, failing=not self._engine.healthy))
        elif isinstance(message, Pong):
            self.round_trips.answered(sender, message)
        elif isinstance(message, Ask):
            cached, pending = self._engine.whereabouts(message.session, message.generation)
            self._send(sender, Whereabouts(message.session, message.generation, cached, pending))
        elif isinstance(message, AskCounters):
            counts = asdict(self.counters) | asdict(self._calls.counters) | asdict(self._engine.counters) | dict(self._network.counts)
            counts = counts | self.gauges | {name: coarse(counts[name]) for name in ("rows", "reused")}
            self._send(sender, Counters({name: int(count) for name, count in counts.items()}))

    def _lose(self, peer: str) -> None:
        """The sessions of a client that is gone are closed; of a server that is gone, its sessions' clients are told."""
        self.round_trips.forget(peer)
        self._probes.forget(peer)
        self._calls.lose(peer)
        self._engine.prompts.lose(peer)
        gone, parted = self._ways.lose(peer)
        for session, way in gone:
            self._engine.receive(Close(session))
            # A server in the middle of the route may never have been connected to the client: it is told by those that were.
            for hop in way.route if peer == way.client else ():
                if hop.peer != self._network.me:
                    self._send(hop.peer, Close(session, way.generation))
        for session, way in parted:
            unreachable = NetworkError("the servers before or behind it cannot reach it")
            self._send(way.client, failed_of(unreachable, session, way.generation, peer=peer))

    def _end(self, sender: str, frame: Cancel | Close) -> None:
        if self._ways.end(sender, frame):
            self._engine.receive(frame)

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
        if way is not None and way.generation == failed.generation and way.passes(sender):
            self._send(way.client, msgspec.structs.replace(failed, peer=sender))

    def _step(self, sender: str, frame: StepFrame) -> None:
        # Until the step is admitted nobody but its sender is answered.
        client, blamed, generation = sender, self._network.me, frame.generation
        new, way = self._ways.get(frame.session) is None, None
        try:
            way = self._ways.of_step(sender, frame, self._measure)
            if way is None:
                self.counters.stale += 1
                return
            client = way.client
            blamed, generation = sender, way.generation
            arch = self._engine.model.arch
            check_shape(arch, frame, from_client=way.from_client(sender))
            step = to_step(frame)
            check_rows(arch, sender, frame, step, way)
            blamed = self._network.me
            # What a step without a way leaves out came with the first one.
            step = replace(
                step,
                settings=way.settings,
                adapter=way.adapter,
                span=way.span,
                asked=way.asked,
                wants_hidden=way.wants_hidden,
                prompt=way.prompt,
                client=way.client,
                began=way.began,
            )
            in_flight = InFlightStep(way, step, bool(frame.route), time.perf_counter(), frame.timings)
            self._engine.receive(step, lambda reply: self._onward.deliver(in_flight, reply))
            way.take(frame)
        except CorollaError as error:
            if way is not None:
                self._ways.refuse(frame.session, way, new=new)
            self.counters.refused += 1
            log.info("a step was refused: %s", error, extra={"session": frame.session, "peer": sender})
            self._send(client, failed_of(error, frame.session, generation, peer=blamed))
        self._forget_unused()

    def _forget_unused(self) -> None:
        for session, way in self._ways.unused():
            if not any(self._engine.whereabouts(session, way.generation)):
                self._ways.forget(session)
                self._engine.receive(Close(session))

    def _measure(self, way: SessionRoute) -> None:
        if way.timed:
            self.round_trips.ask({way.before, way.sends_here} - self.round_trips.seconds.keys())

    def _send(self, peer: str, message: WireMessage) -> None:
        try:
            self._network.send(peer, message)
        except (NetworkError, CallerError) as error:  # this server is leaving, or no frame holds what a client wanted sent
            log.info("a message was not sent: %s", error, extra={"peer": peer})
