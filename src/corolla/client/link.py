"""One session's way through the swarm: along a route of servers, and along another when one of them fails or leaves.

Recovery is the rule of positions and nothing else: a link whose route broke tells its session `Gap(0)`, the session sends its
history again, and that step takes a new route. What late or hung servers still send belongs to an older generation.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from corolla.client.suspicion import problem_of, suspects
from corolla.errors import AdapterNeeded, Forgotten, NetworkError, NoRoute, ProtocolError
from corolla.swarm.bans import blameworthy
from corolla.swarm.convert import error_of, from_message, from_prompt_name, from_settings, to_reply
from corolla.swarm.routing import Quality, Route, WantedAdapter
from corolla.swarm.transport import Deliver
from corolla.swarm.wire import (
    MAX_STEP_TOKENS,
    Ask,
    CachedFrame,
    FailedFrame,
    GapFrame,
    Hop,
    ScoresFrame,
    StepFrame,
    TokenFrame,
    Whereabouts,
)
from corolla.types import AdapterPart, Close, Gap, Give, Message, PromptPart, Span, Step

if TYPE_CHECKING:
    from corolla.client.swarm import SwarmTransport

log = logging.getLogger(__name__)


class SwarmLink:
    """One session's way through the swarm. See `transport.Link`."""

    def __init__(self, transport: SwarmTransport, deliver: Deliver) -> None:
        self._transport = transport
        self._deliver = deliver
        self._lock = threading.RLock()
        self._session, self._generation = "", 0
        self._route: Route | None = None
        self._taken = 0.0  # when the route was, or was last compared with others
        self._quality: Quality | None = None  # of the route before this one
        self._adapter: WantedAdapter | None = None
        self._lacking: set[str] = set()  # servers of the route that have not the adapter
        self._cold = True  # nobody on the route has anything of the session yet
        self._step: Step | None = None  # under way
        self._position = 0  # of the next token to come
        self._replied = 0.0  # when the last reply to the step came, or it was sent
        self._since = 0.0  # the same, or when the servers last said that they live
        self._gaps = 0  # since the last token
        self._stood_still = 0  # times, since the route was taken
        self._whereabouts: dict[str, tuple[int, int]] | None = None  # tokens cached and pending by server, when they were asked
        self._said_before: dict[str, tuple[int, int]] | None = None
        self._asked: float | None = None  # when the route's servers were asked whether they live

    @property
    def route(self) -> Route | None:
        """The servers of the session, if it has any at the moment."""
        return self._route

    def send(self, message: Message) -> None:
        """See `Link.send`; also raises `NoRoute` while some block has no server."""
        with self._lock:
            self._session = message.session
            if isinstance(message, Step):
                self._transport.enter(message.session, self)
                self._send_step(message)
                return
            if isinstance(message, Give):
                self._give(message.part)
                return
            self._step = None
            for peer in self._route.peers if self._route is not None else ():
                self._transport.network.send(peer, from_message(message))
            if isinstance(message, Close):
                self._transport.leave(self)

    def close(self) -> None:
        """See `Link.close`."""
        self._step = None
        self._transport.leave(self)

    def receive(self, sender: str, frame: TokenFrame | ScoresFrame | CachedFrame | GapFrame | FailedFrame) -> None:
        """A reply; one to an earlier step, a repeated one, and one from a server that is not on the route are dropped."""
        with self._lock:
            step, route = self._step, self._route
            if step is None or route is None or sender not in route.peers:
                return
            if frame.generation != step.generation or isinstance(frame, CachedFrame):
                return
            self._heard()
            if isinstance(frame, FailedFrame) and blameworthy(error := error_of(frame)):
                self.lost(frame.peer if frame.peer in route.peers else sender, error)
                return
            if isinstance(frame, FailedFrame) and isinstance(needed := error_of(frame), Forgotten):
                lacking = frame.peer if frame.peer in route.peers else sender
                self._transport.lacks_parts(lacking)
                if isinstance(needed, AdapterNeeded):
                    self._lacking.add(lacking)
            if isinstance(frame, TokenFrame) and frame.position < self._position:
                return
            self._gaps += isinstance(frame, GapFrame)
            problem = problem_of(
                frame,
                from_head=sender == route.peers[-1],
                start=step.start,
                position=self._position,
                gaps=self._gaps,
                vocabulary=self._transport.vocabulary,
            )
            if problem is not None:
                self.lost(sender, ProtocolError(problem))
                return
            if isinstance(frame, TokenFrame):
                self._position += 1
                self._gaps = 0
            if isinstance(frame, FailedFrame) or (isinstance(frame, TokenFrame) and frame.finish is not None):
                self._step = None
            self._transport.bans.forgive(sender)
            if isinstance(frame, GapFrame):
                self._transport.counters.replays += frame.have == 0
        self._deliver(to_reply(frame))

    def told(self, sender: str, answer: Whereabouts) -> None:
        """A server said how the session is getting on: if none has anything to compute, and none has got further since it was
        asked before, a message was lost on the way."""
        with self._lock:
            step, route, said = self._step, self._route, self._whereabouts
            if step is None or route is None or said is None or answer.generation != step.generation:
                return
            said[sender] = answer.cached, answer.pending
            if set(said) < set(route.peers):
                return
            stands_still = said == self._said_before and not any(pending for _, pending in said.values())
            self._said_before, self._whereabouts, self._replied = said, None, time.monotonic()
            if not stands_still:
                return
            self._stood_still += 1
            suspected = suspects(route.peers, said) if self._stood_still > 1 else []
            log.warning("an answer got lost on its way: it is asked for again", extra={"session": self._session})
            gap = None if suspected else self._start_again()
        for peer in suspected:
            self.lost(peer, NetworkError("answers get lost there"))
        if gap is not None:
            self._deliver(gap)

    def lost(self, peer: str, error: Exception) -> None:
        """A server failed: if it is one of ours, the session is told to send its history again."""
        with self._lock:
            if self._route is None or peer not in self._route.peers:
                return
            seconds = self._transport.bans.blame(peer)
            self._transport.counters.faults += 1
            log.warning("server %s is left for %.0f s: %s", peer, seconds, error, extra={"session": self._session, "peer": peer})
            self._abandon()
            gap = self._start_again()
        if gap is not None:
            self._deliver(gap)

    def left(self, peer: str) -> None:
        """A server wants to leave: the session goes on elsewhere if it can, and else stays for as long as it is served."""
        with self._lock:
            if self._route is None or peer not in self._route.peers:
                return
            try:
                route = self._transport.router.route(self._transport.avoided, self._needed, self._quality, self._adapter)
            except (NoRoute, NetworkError) as error:
                log.info("server %s wants to leave and must stay: %s", peer, error, extra={"session": self._session, "peer": peer})
                return
            gap = self._move(route)
        if gap is not None:
            self._deliver(gap)

    def check(self, now: float) -> None:
        """Ask a silent route's servers whether they live, give up those that do not say so, and leave a route that has become slow."""
        patience, transport = self._transport.patience, self._transport
        with self._lock:
            if self._step is None or self._route is None:
                return
            if self._whereabouts is None and now - self._replied > patience.lost:
                self._whereabouts = {}
                for peer in self._route.peers:
                    transport.network.send(peer, Ask(self._session, self._step.generation))
            if self._asked is None:
                if now - self._since > patience.silence:
                    self._asked = now
                    transport.round_trips.ask(self._route.peers)
                    return
                gap = self._reconsider(now)
                silent = []
            elif now - self._asked < patience.answer:
                return
            else:
                gap = None
                silent = [peer for peer in self._route.peers if transport.heard(peer) < self._asked and not transport.carrying(peer)]
                for peer in silent:
                    transport.silent(peer)
                self._since, self._asked = now, None
        for peer in silent:
            self.lost(peer, NetworkError(f"it did not answer for {patience.silence + patience.answer:g} s"))
        if gap is not None:
            self._deliver(gap)

    def _heard(self) -> None:
        """The step is getting on."""
        self._replied = self._since = time.monotonic()
        self._asked = self._whereabouts = self._said_before = None

    @property
    def _needed(self) -> int:
        """Tokens that a new route must have room for."""
        return max(1, self._position)

    def _reconsider(self, now: float) -> Gap | None:
        transport = self._transport
        if self._route is None or now - self._taken < transport.patience.reconsider:
            return None
        self._taken = now
        route = transport.router.quicker(self._route, transport.avoided, self._needed, self._adapter)
        return None if route is None else self._move(route)

    def _move(self, route: Route) -> Gap | None:
        assert self._route is not None
        log.info("from %s to %s", self._route.peers, route.peers, extra={"session": self._session})
        self._transport.counters.moves += 1
        self._abandon()
        self._take(route)
        return self._start_again()

    def _start_again(self) -> Gap | None:
        """Nobody on a new route has anything of the session: what to tell it, if a step is under way."""
        step, self._step = self._step, None
        if step is None:
            return None
        self._transport.counters.replays += 1
        return Gap(step.session, step.generation, 0)

    def _take(self, route: Route) -> None:
        self._route, self._taken, self._cold = route, time.monotonic(), True
        self._quality = route.quality
        self._lacking = set(route.lacking)
        self._gaps = self._stood_still = 0

    def _send_step(self, step: Step) -> None:
        tokens = tuple(step.payload)
        self._adapter = WantedAdapter(step.adapter, step.brings_adapter) if step.adapter else None
        if self._route is None:
            self._take(self._transport.router.route(self._transport.avoided, step.start + len(tokens), self._quality, self._adapter))
        if self._cold and step.start:
            self._deliver(Gap(step.session, step.generation, 0))
            return
        self._cold = False
        assert self._route is not None
        hops = tuple(Hop(hop.peer, hop.start, hop.end) for hop in self._route.hops)
        self._step, self._generation = step, step.generation
        self._heard()
        self._position = step.start + len(tokens)
        settings = from_settings(step.settings) if step.settings is not None else None
        for first in range(0, len(tokens), MAX_STEP_TOKENS):
            piece = tokens[first : first + MAX_STEP_TOKENS]
            last = first + len(piece) == len(tokens)
            frame = StepFrame(
                step.session,
                step.generation,
                step.start + first,
                piece,
                settings=settings if last or (settings is not None and settings.prompt_logprobs) else None,
                route=hops,
                client=self._transport.network.me,
                adapter=step.adapter,
                prompt=from_prompt_name(step.prompt),
                asked=step.asked,
                more=not last,
                timed=self._transport.timed,
                began=step.start if first else None,
            )
            self._transport.network.send(hops[0].peer, frame)

    def _give(self, part: PromptPart | AdapterPart) -> None:
        """To all servers of the route at once, if they may lack it: they were started, or chosen, together. Each gets what its own
        blocks need."""
        for hop in self._route.hops if self._route is not None else ():
            if isinstance(part, AdapterPart):
                if hop.peer in self._lacking:
                    self._transport.give_adapter(hop.peer, part.of(Span(hop.start, hop.end)))
                continue
            rows = part.input if hop.start == 0 else None
            deep = None if part.deep is None else part.deep[hop.start : hop.end]
            if rows is not None or deep is not None:
                self._transport.give(hop.peer, PromptPart(part.name, Span(hop.start, hop.end), rows, deep))

    def _abandon(self) -> None:
        """Let go of the route: its servers are told, as far as they hear."""
        route, self._route = self._route, None
        for peer in route.peers if route is not None else ():
            try:
                self._transport.network.send(peer, from_message(Close(self._session, self._generation)))
            except NetworkError:
                return
