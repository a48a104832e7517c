"""One session's way through the swarm: along a route of servers, and along another when one of them fails or leaves.

Recovery is the rule of positions and nothing else: a link whose route broke tells its session `Gap(0)`, the session sends its
history again, and that step takes a new route. What late or hung servers still send belongs to an older generation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from corolla.client.parts import Parts
from corolla.client.patience import ClientCounters, Patience, Router
from corolla.client.peers import PeerBook
from corolla.client.progress import Progress, Standstill
from corolla.client.reply_progress import ReplyProgress
from corolla.client.reply_validation import Asked, ReplyFrame, believed, suspects
from corolla.errors import (
    AdapterNeeded,
    CallerError,
    CapacityError,
    CorollaError,
    Forgotten,
    NetworkError,
    NoRoute,
    PromptNeeded,
    ProtocolError,
    ServerFault,
)
from corolla.messages import Ask, Cached, Close, FailedFrame, Gap, Message, StepFrame, Token, Whereabouts
from corolla.swarm.bans import Bans, blameworthy
from corolla.swarm.convert import error_of, from_settings
from corolla.swarm.network import Network
from corolla.swarm.pings import RoundTrips
from corolla.swarm.routing import Quality, Route, WantedAdapter
from corolla.swarm.transport import Deliver
from corolla.types import MAX_STEP_TOKENS, AdapterPart, Failed, Give, PromptPart, Span, Step

log = logging.getLogger(__name__)

_SETBACKS = 2  # answers that got lost, until a server is suspected: a stream between two honest ones may break once
_LEAST_FULL = 0.25  # seconds that a full server is gone around, whatever it says
_MOST_FORGOTTEN = 4  # times that servers asked for what they were sent, until others are asked


class LinkOwner(Protocol):
    """All links of one client share these; see `SwarmTransport`."""

    network: Network
    router: Router
    bans: Bans
    patience: Patience
    vocabulary: int | None
    timed: bool
    counters: ClientCounters
    round_trips: RoundTrips
    peers: PeerBook
    parts: Parts

    @property
    def avoided(self) -> frozenset[str]: ...

    def route(
        self,
        needed_tokens: int,
        like: Quality | None = None,
        adapter: WantedAdapter | None = None,
        around: Collection[str] = (),
    ) -> Route: ...

    def enter(self, session: str, link: SwarmLink) -> None: ...

    def leave(self, link: SwarmLink) -> None: ...


class SwarmLink:
    """One session's way through the swarm. See `transport.Link`."""

    def __init__(self, transport: LinkOwner, deliver: Deliver) -> None:
        self._transport = transport
        self._deliver = deliver
        self._lock = threading.RLock()
        self._session, self._generation = "", 0
        self._finished = -1  # the generation of the last answer that came to its end
        self._route: Route | None = None
        self._taken = 0.0  # when the route was, or was last compared with others
        self._quality: Quality | None = None  # of the route before this one
        self._adapter: WantedAdapter | None = None
        self._lacking: set[str] = set()  # servers of the route that have not the adapter
        self._cold = True  # nobody on the route has anything of the session yet
        self._step: Step | None = None  # under way
        self._answers = ReplyProgress()
        self._progress = Progress(0.0, 0.0)
        self._forgotten = 0  # times that servers asked for what they were sent, since the last token
        self._refused = False  # a server blamed the caller, and another route was asked

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
            self._end()
            for peer in self._route.peers if self._route is not None else ():
                self._transport.network.send(peer, message)
            if isinstance(message, Close):
                self._transport.leave(self)

    def close(self) -> None:
        """See `Link.close`."""
        self._end()
        self._transport.leave(self)

    def receive(self, sender: str, frame: ReplyFrame) -> None:
        """A reply; one to an earlier step, a repeated one, and one from a server that is not on the route are dropped."""
        with self._lock:
            step, route = self._step, self._route
            if route is None or sender not in route.peers:
                return
            if step is None:
                if isinstance(frame, Token) and frame.generation == self._finished and frame.position >= self._answers.position:
                    self._transport.counters.lies += 1
                    self._give_up([sender], ProtocolError("it goes on after an answer has ended"))
                return
            if frame.generation != step.generation or isinstance(frame, Cached):
                return
            if isinstance(frame, FailedFrame):
                self._fail(step, frame.peer if frame.peer in route.peers else sender, believed(error_of(frame)))
                return
            answers = self._answers
            if (problem := answers.problem_of(frame, from_head=sender == route.peers[-1])) is not None:
                self._transport.counters.lies += 1
                self._give_up(self._with_before(sender) if answers.keeps_back(frame) else [sender], ProtocolError(problem))
                return
            if answers.is_repeated(frame):
                return
            if answers.is_ahead(frame):
                self._set_back([sender], doubt=False)
                return
            if isinstance(frame, Gap):
                # A later chunk of the step, or the answer's next token, got lost: the whole step is sent again.
                frame = answers.within_step(frame)
                self._transport.counters.replays += frame.have == 0
            else:
                answers.get_on(frame)
                self._progress.restart(time.monotonic())
                self._forgotten = 0
            if isinstance(frame, Token) and frame.finish is not None:
                self._end()
                self._finished = step.generation
                for peer in route.peers:
                    self._transport.bans.forgive(peer)
        self._deliver(frame)

    def on_status(self, sender: str, answer: Whereabouts) -> None:
        """A server said how the session is getting on."""
        with self._lock:
            step, route, progress = self._step, self._route, self._progress
            if step is None or route is None or sender not in route.peers or answer.generation != step.generation:
                return
            if progress.asked is None:
                return  # nobody asked, or it is too late
            if progress.record(sender, answer, self._answers.position) == len(route.peers):
                self._judge(progress.conclude(route.peers, time.monotonic()))

    def on_failure(self, peer: str, error: Exception, *, blame: bool = True) -> None:
        """A server failed: if it is one of ours, the session is told to send its history again."""
        with self._lock:
            if self._route is None or peer not in self._route.peers:
                return
            if blame:
                self._give_up([peer], error)
            else:
                self._abandon()
                self._start_again()

    def fail(self, error: Exception) -> None:
        """This client itself failed: the step under way ends."""
        with self._lock:
            step = self._step
            self._end()
        if step is not None:
            self._deliver(Failed(step.session, step.generation, CorollaError(f"an unexpected error in this client: {error!r}")))

    def on_leaving(self, peer: str) -> None:
        """A server wants to leave: the session goes on elsewhere if it can, and else stays for as long as it is served."""
        with self._lock:
            if self._route is None or peer not in self._route.peers:
                return
            if not self._go_around([peer]):
                log.info("server %s wants to leave and must stay", peer, extra={"session": self._session, "peer": peer})

    def excuse(self) -> None:
        """This process stood still: what servers sent meanwhile is still to be read."""
        with self._lock:
            self._progress.restart(time.monotonic())

    def check(self) -> None:
        """Ask the servers of a route on which nothing gets on whether they live, and how far they are; give up those that do not say
        so, and leave a route that has become slow."""
        patience, progress, now = self._transport.patience, self._progress, time.monotonic()
        with self._lock:
            if self._step is None or self._route is None:
                return
            if progress.asked is not None:
                if now - progress.asked > patience.lost:
                    self._judge(progress.conclude(self._route.peers, now))
                    return
            elif now - progress.moved > patience.lost:
                progress.ask(now)
                for peer in self._route.peers:
                    self._transport.network.send(peer, Ask(self._session, self._step.generation))
            if progress.pinged is not None:
                if now - progress.pinged >= patience.answer:
                    self._part_with_silent(progress.pinged)
                    progress.alive, progress.pinged = now, None
            elif now - progress.alive > patience.silence:
                progress.pinged = now
                self._transport.round_trips.ask(self._route.peers)
            else:
                self._reconsider(now)

    def _part_with_silent(self, since: float) -> None:
        assert self._route is not None, "a session without a route waits for nobody"
        transport, patience = self._transport, self._transport.patience
        silent = [peer for peer in self._route.peers if transport.peers.heard(peer) < since and not transport.parts.carrying(peer)]
        for peer in silent:
            transport.peers.fall_silent(peer)
            self._blame(peer, NetworkError(f"it did not answer for {patience.silence + patience.answer:g} s"))
        if silent:
            self._abandon()
            self._start_again()

    # What an answer says, and what comes of it. All of these hold the lock.

    def _fail(self, step: Step, peer: str, error: CorollaError) -> None:
        """The server `peer` of the route answered an error."""
        transport = self._transport
        if isinstance(error, Forgotten):
            if not (isinstance(error, AdapterNeeded) and step.adapter) and not (isinstance(error, PromptNeeded) and step.prompt):
                transport.counters.lies += 1
                error = ServerFault("it asks for what the step does not name")
            else:
                transport.parts.lacks(peer)
                self._forgotten += 1
                if isinstance(error, AdapterNeeded):
                    self._lacking.add(peer)
        if blameworthy(error):
            self._give_up([peer], error)
            return
        if isinstance(error, CapacityError):
            error.retry_after = min(max(error.retry_after, _LEAST_FULL), transport.patience.full)
            transport.peers.fill(peer, error.retry_after)
            if self._go_around([peer]):
                transport.counters.full += 1
                return
        elif (isinstance(error, CallerError) or self._forgotten > _MOST_FORGOTTEN) and not self._refused:
            self._refused = True
            if any(self._go_around(peers) for peers in self._refusers(peer)):
                transport.counters.refusals += 1
                return
        if isinstance(error, CallerError):
            self._end()
        self._step = None
        self._deliver(Failed(step.session, step.generation, error))

    def _refusers(self, peer: str) -> list[list[str]]:
        """Whom to go around where `peer` refuses a step: the server before it may have spoiled that."""
        both = self._with_before(peer)
        return [both, [peer], both[:1]] if len(both) > 1 else [both]

    def _with_before(self, peer: str) -> list[str]:
        """A server of the route, behind the one before it if there is one."""
        peers = self._route.peers if self._route is not None else (peer,)
        place = peers.index(peer)
        return list(peers[max(0, place - 1) : place + 1])

    def _judge(self, standstill: Standstill | None) -> None:
        """The servers were asked twice how far they are, and none got further."""
        if standstill is None or self._route is None:
            return
        if not standstill.working:
            self._set_back(suspects(self._route.peers, standstill.said, self._answers.position), doubt=True)
            return
        try:
            self._find(standstill.working)
        except (NoRoute, NetworkError) as error:
            log.info("servers %s compute for long, and nobody else does: %s", standstill.working, error, extra={"session": self._session})
            return
        for peer in standstill.working:
            self._blame(peer, NetworkError("it says that it computes, and got no further"))
        self._abandon()
        self._start_again()

    def _set_back(self, suspected: Sequence[str], *, doubt: bool) -> None:
        """An answer got lost on its way. The first time nobody is to blame; those that are in `doubt` are gone around if they can be."""
        if self._answers.set_back() >= _SETBACKS:
            self._give_up(suspected, NetworkError("answers get lost there"))
            return
        log.warning("an answer got lost on its way: it is asked for again", extra={"session": self._session})
        for peer in self._transport.peers.doubt(suspected) if doubt else ():
            self._blame(peer, NetworkError("answers get lost there again and again"))
        if not (doubt and self._go_around(suspected)):
            self._start_again()

    def _give_up(self, peers: Sequence[str], error: Exception) -> None:
        """One of these servers of the route is at fault: the session goes on without them."""
        bans = self._transport.peers.doubt(peers) if len(peers) > 1 else peers
        if not bans:
            self._transport.counters.faults += 1
            log.warning("servers %s are gone around, one of them is at fault: %s", peers, error, extra={"session": self._session})
        for peer in bans:
            self._blame(peer, error)
        self._abandon()
        self._start_again()

    def _blame(self, peer: str, error: Exception) -> None:
        seconds = self._transport.bans.blame(peer)
        self._transport.counters.faults += 1
        log.warning("server %s is left for %.0f s: %s", peer, seconds, error, extra={"session": self._session, "peer": peer})

    # The route.

    @property
    def _needed(self) -> int:
        """Tokens that a new route must have room for."""
        return max(1, self._answers.position)

    def _find(self, around: Collection[str] = ()) -> Route:
        """Raises `NoRoute` and `NetworkError`."""
        return self._transport.route(self._needed, self._quality, self._adapter, around)

    def _go_around(self, peers: Collection[str]) -> bool:
        """Go on without these servers, if there is a way."""
        try:
            self._move(self._find(peers))
        except (NoRoute, NetworkError):
            return False
        return True

    def _reconsider(self, now: float) -> None:
        transport = self._transport
        if self._route is None or now - self._taken < transport.patience.reconsider:
            return
        self._taken = now
        route = transport.router.quicker(self._route, transport.avoided, self._needed, self._adapter)
        if route is not None:
            self._move(route)

    def _move(self, route: Route) -> None:
        assert self._route is not None, "a session without a route takes one, and does not move"
        log.info("from %s to %s", self._route.peers, route.peers, extra={"session": self._session})
        self._transport.counters.moves += 1
        self._abandon()
        self._take(route)
        self._start_again()

    def _start_again(self) -> None:
        """Nobody on a new route has anything of the session: it is told to send its history again, if a step is under way."""
        step, self._step = self._step, None
        if step is not None:
            self._transport.counters.replays += 1
            self._deliver(Gap(step.session, step.generation, 0))

    def _end(self) -> None:
        """The answer is over."""
        self._step = None
        self._refused, self._forgotten = False, 0

    def _take(self, route: Route) -> None:
        self._route, self._taken, self._cold = route, time.monotonic(), True
        self._quality = route.quality
        self._lacking = set(route.lacking)
        self._answers = ReplyProgress()

    def _send_step(self, step: Step) -> None:
        tokens = tuple(step.payload)
        self._adapter = WantedAdapter(step.adapter, step.brings_adapter) if step.adapter else None
        if self._route is None:
            self._take(self._transport.route(step.start + len(tokens), self._quality, self._adapter))
        if self._cold and step.start:
            self._deliver(Gap(step.session, step.generation, 0))
            return
        self._cold = False
        assert self._route is not None
        hops = self._route.hops
        self._step, self._generation = step, step.generation
        self._progress.restart(time.monotonic())
        timed = self._route.peers if self._transport.timed else ()
        self._answers.begin(Asked(step.start, step.start + len(tokens), step.settings, self._transport.vocabulary, timed))
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
                prompt=step.prompt,
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
                    self._transport.parts.give_adapter(hop.peer, part.of(Span(hop.start, hop.end)))
                continue
            rows = part.input if hop.start == 0 else None
            deep = None if part.deep is None else part.deep[hop.start : hop.end]
            if rows is not None or deep is not None:
                self._transport.parts.give(hop.peer, PromptPart(part.name, Span(hop.start, hop.end), rows, deep))

    def _abandon(self) -> None:
        """Let go of the route: its servers are told, as far as they hear."""
        route, self._route = self._route, None
        for peer in route.peers if route is not None else ():
            try:
                self._transport.network.send(peer, Close(self._session, self._generation))
            except NetworkError:
                return
