"""Where a server's replies go: rows to the next server of the route, tokens to the client and round the ring."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from corolla.barrier import barrier
from corolla.engine.engine import Engine
from corolla.errors import CallerError, CorollaError, NetworkError
from corolla.messages import Cancel, Gap, HopTiming, Reply, StepFrame, Token, WireDtype, WireMessage
from corolla.server.session_table import SessionRoute
from corolla.swarm.convert import failed_of, from_hidden, from_step
from corolla.swarm.network import Network
from corolla.swarm.pings import RoundTrips
from corolla.types import Failed, Hidden, Step

log = logging.getLogger(__name__)


@dataclass(slots=True)
class NodeCounters:
    """What happened since the server was made."""

    pushes: int = 0  # of hidden states to the next server
    ring_steps: int = 0  # steps that went from the last server straight to the first
    refused: int = 0  # steps answered with an error
    stale: int = 0  # steps that were dropped: late, repeated, or of a generation that is over


@dataclass(slots=True, eq=False)
class InFlightStep:
    """A step in the engine. `since` is when it came, or its last reply went."""

    way: SessionRoute
    step: Step
    tells_way: bool  # whether the next server has to be told the way
    since: float
    timings: tuple[HopTiming, ...]


class ReplyRouter:
    """On the engine's thread.

    Args:
        send: for one message that may fail by itself.
    """

    def __init__(
        self,
        engine: Engine,
        network: Network,
        send: Callable[[str, WireMessage], None],
        *,
        wire_dtype: WireDtype,
        counters: NodeCounters,
        round_trips: RoundTrips,
    ) -> None:
        self._engine, self._network, self._send = engine, network, send
        self._wire_dtype, self._counters, self._round_trips = wire_dtype, counters, round_trips
        self._held: list[tuple[str, WireMessage]] = []  # replies of the engine's turn

    def deliver(self, under_way: InFlightStep, reply: Reply) -> None:
        """Take what the engine made of a step."""
        try:
            self._reply(under_way, reply)
        except CorollaError as error:  # what cannot be sent in the wire dtype, say
            self._hold(under_way.way.client, failed_of(error, reply.session, reply.generation, peer=self._network.me))

    def _reply(self, under_way: InFlightStep, reply: Reply) -> None:
        way = under_way.way
        followed = isinstance(reply, Token) and reply.more
        timings = self._timings(under_way) if way.timed and not followed else ()
        if isinstance(reply, (Gap, Failed)):
            way.over = True
        if isinstance(reply, Hidden) and not way.last:
            self._pass_on(under_way, reply, timings)
            return
        if isinstance(reply, Token) and len(way.route) > 1 and not followed:
            self._close_ring(way, reply)
        self._hold(way.client, self._message(reply, timings))

    def _message(self, reply: Reply, timings: tuple[HopTiming, ...]) -> WireMessage:
        """The reply as its client gets it. Raises `ServerFault` like `to_array`."""
        if isinstance(reply, Failed):
            return failed_of(reply.error, reply.session, reply.generation, peer=self._network.me)
        if isinstance(reply, Hidden):
            return from_hidden(reply, self._wire_dtype, timings)
        if isinstance(reply, Token) and (timings or reply.more or reply.drafts):
            return msgspec.structs.replace(reply, timings=timings, more=False, drafts=())
        return reply

    def _pass_on(self, under_way: InFlightStep, reply: Hidden, timings: tuple[HopTiming, ...]) -> None:
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
            drafts=reply.drafts,
            began=step.began_at,
        )
        hop = way.hop + 1
        if under_way.tells_way:
            frame = from_step(
                onward,
                wire_dtype=self._wire_dtype,
                route=way.route,
                hop=hop,
                client=way.client,
                timed=way.timed,
                timings=timings,
            )
        else:
            frame = from_step(onward, wire_dtype=self._wire_dtype, timings=timings)
        self._counters.pushes += 1
        self._hold(way.route[hop].peer, frame)

    def _close_ring(self, way: SessionRoute, token: Token) -> None:
        """The token goes on where the route begins, with guesses of what follows it; after the last one the other servers are told that
        the answer has ended."""
        if token.finish is None:
            self._counters.ring_steps += 1
            tokens, drafts = (token.token_id, *token.drafts), len(token.drafts)
            self._hold(way.route[0].peer, StepFrame(token.session, token.generation, token.position, tokens, drafts=drafts))
        else:
            for hop in way.route[:-1]:
                self._hold(hop.peer, Cancel(token.session, token.generation))

    def _timings(self, under_way: InFlightStep) -> tuple[HopTiming, ...]:
        now, compute = time.perf_counter(), self._engine.forward_seconds
        queue = max(0.0, now - under_way.since - compute)
        under_way.since = now
        transfer = self._round_trips.of(under_way.way.sends_here) / 2
        return (*under_way.timings, HopTiming(self._network.me, queue, compute, transfer))

    def _hold(self, peer: str, message: WireMessage) -> None:
        """Send it with the other replies of the engine's turn: what was computed together goes on together."""
        self._held.append((peer, message))

    def send_held(self) -> None:
        """At the end of the engine's turn."""
        held, self._held = self._held, []
        if not held:
            return
        with barrier("the replies of an engine's turn", lambda error: self._send_each(held)):
            try:
                self._network.send_all(held)
            except NetworkError as error:  # this server is leaving
                log.info("replies were not sent: %s", error)
            except CallerError:
                self._send_each(held)

    def _send_each(self, held: list[tuple[str, WireMessage]]) -> None:
        """One of them cannot be sent, and must not take the others along."""
        for peer, message in held:
            with barrier("a reply"):
                self._send(peer, message)
