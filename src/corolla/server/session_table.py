"""The ways of a server's sessions: who may bring a step, where it goes on, and which generations and sessions are over."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from corolla.errors import Busy, InvalidSetting, NetworkError, ServerFault, Unauthorized
from corolla.messages import Cancel, Close, Hop, StepFrame, WireDtype
from corolla.swarm.convert import to_settings
from corolla.types import GenerationSettings, PromptName, Span

_REMEMBERED = 4096  # closed sessions, whose late steps are refused
_FOR_EVER = 2**63 - 1  # a generation that none comes after
_OLDEST_ASKED = 120_000  # milliseconds before a step's arrival


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanServerConfig:
    """`wire_dtype` is that of the hidden states sent on: the model's own where the answer must not depend on the route."""

    wire_dtype: WireDtype
    sessions: int = 4096  # open at once, idle ones among them; one more is Busy
    idle: float = 3600.0  # seconds after which a session of which nothing came, and nothing is cached, is forgotten
    sessions_per_client: int = 1024
    sessions_per_server: int = 2048  # that one server before this one brings
    retry_after: float = 1.0  # seconds, told to who is turned away


@dataclass(slots=True, eq=False)
class SessionRoute:
    """How a session goes on from here, and what else came with its first step and need not come again."""

    generation: int
    route: tuple[Hop, ...]
    hop: int
    client: str
    adapter: str
    claimed: int  # when its caller says that the answer was asked for, in Unix milliseconds
    asked: int  # the same, as servers go by it
    timed: bool
    began: int  # the position of the generation's first row
    wants_hidden: bool
    settings: GenerationSettings | None = None
    prompt: PromptName | None = None
    last_start: int = -1  # where the last step that was taken in begins: those of a generation begin later and later
    end: int = 0  # of its rows, guesses among them
    over: bool = False  # the generation was cancelled, refused or failed: what still comes of it is stale
    cancelled: int = -1  # the latest generation that was cancelled before its first step came
    used: float = 0.0  # when a step came last, on `time.monotonic`'s clock

    @classmethod
    def of(cls, sender: str, frame: StepFrame) -> SessionRoute:
        """The way that a step of `sender` brings. Raises `InvalidSetting` for settings outside their ranges."""
        return cls(
            frame.generation,
            frame.route,
            frame.hop,
            frame.client or sender,
            frame.adapter,
            frame.asked,
            frame.asked,
            frame.timed,
            frame.start if frame.began is None else frame.began,
            wants_hidden=frame.output == "hidden",
            settings=None if frame.settings is None else to_settings(frame.settings),
            prompt=frame.prompt,
        )

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

    def passes(self, peer: str) -> bool:
        """Whether a server is on it."""
        return any(hop.peer == peer for hop in self.route)

    def from_client(self, sender: str) -> bool:
        """Whether a step that `sender` brings is the client's own, and its mistakes too."""
        return self.hop == 0 and sender == self.client

    def take(self, frame: StepFrame) -> None:
        """A step's rows are taken in."""
        self.last_start, self.end = frame.start, frame.start + rows_of(frame)

    def goes_on_from(self, known: SessionRoute) -> None:
        """A new generation of a session whose way was `known`."""
        self.cancelled = known.cancelled
        if self.claimed == known.claimed:
            self.asked = known.asked  # the same answer, sent again


def rows_of(frame: StepFrame) -> int:
    return len(frame.tokens) if frame.hidden is None else frame.hidden.shape[0]


class EndedGenerations:
    """The generations that ended last, by session and by who said so."""

    def __init__(self) -> None:
        self._ended: OrderedDict[tuple[str, str], int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, session: str, sender: str, generation: int | None) -> None:
        """`sender` says that it is over, up to a generation."""
        last = _FOR_EVER if generation is None else generation
        self._ended[session, sender] = max(last, self._ended.pop((session, sender), -1))
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def holds(self, session: str, way: SessionRoute) -> bool:
        """Whether somebody on this way said that it is over; for good, only its client can say."""
        by_servers = (self._ended.get((session, hop.peer), -1) for hop in way.route)
        by_client = self._ended.get((session, way.client), -1)
        return by_client >= way.generation or any(way.generation <= last < _FOR_EVER for last in by_servers)


class SessionTable:
    """On the network's thread, but for `len` and `clients`.

    Args:
        me: this server's id.
        span: the blocks that it holds, of `blocks` of the model.
        clock: counts seconds; `wall_clock` is the Unix time.
    """

    def __init__(
        self,
        me: str,
        span: Span,
        blocks: int,
        config: SpanServerConfig,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._me, self._span, self._blocks, self._config = me, span, blocks, config
        self._clock, self._wall_clock = clock, wall_clock
        self._ways: dict[str, SessionRoute] = {}
        # How many sessions there are by (client, who brings their steps) and by who brings them: counting them all for each newcomer
        # took 72 ms where a client asked for more sessions than it may have.
        self._of_client: Counter[tuple[str, str]] = Counter()
        self._of_sender: Counter[str] = Counter()
        # Apart, so that nobody pushes out what is known with sessions that never were.
        self._over, self._over_unknown = EndedGenerations(), EndedGenerations()
        self._swept = clock()
        self.leaving = False  # no new session is taken

    def __len__(self) -> int:
        return len(self._ways)

    @property
    def clients(self) -> set[str]:
        return {way.client for way in list(self._ways.values())}

    def get(self, session: str) -> SessionRoute | None:
        return self._ways.get(session)

    def lose(self, peer: str) -> tuple[list[tuple[str, SessionRoute]], list[tuple[str, SessionRoute]]]:
        """A peer is gone. Forget the sessions that it was the client of, or brought the steps of: whoever it named as their client may
        have never heard of them. Returns them, and all whose route goes by a server of that id."""
        parted = [(session, way) for session, way in self._ways.items() if way.passes(peer)]
        gone = [(session, way) for session, way in self._ways.items() if peer in (way.client, way.before)]
        for session, _ in gone:
            self._forget(session)
        return gone, parted

    def unused(self) -> Iterator[tuple[str, SessionRoute]]:
        """The sessions of which nothing came for `SpanServerConfig.idle` seconds; looked for once in a sixtieth of that time."""
        now, idle = self._clock(), self._config.idle
        if now - self._swept < idle / 60:
            return
        self._swept = now
        yield from [(session, way) for session, way in self._ways.items() if now - way.used > idle]

    def end(self, sender: str, frame: Cancel | Close) -> bool:
        """Whether the engine is told that an answer or a session ends, as by somebody who may say so.

        Either may overtake the first step of its generation, which comes another way: then that is dropped.
        """
        way = self._ways.get(frame.session)
        if way is None:
            self._over_unknown.add(frame.session, sender, frame.generation)
            return False
        if sender != way.client and (frame.generation is None or not way.passes(sender)):
            return False
        if isinstance(frame, Cancel):
            way.cancelled = max(way.cancelled, frame.generation)
            way.over |= frame.generation == way.generation
            return True
        self._over.add(frame.session, sender, frame.generation)
        if frame.generation is None or way.generation <= frame.generation:
            self._forget(frame.session)
        return True

    def forget(self, session: str) -> None:
        """The session is over; one that is not known is no error."""
        if session in self._ways:
            self._forget(session)

    def refuse(self, session: str, way: SessionRoute, *, new: bool) -> None:
        """A step of the way's generation was refused, and so is the rest of it. A `new` session is forgotten."""
        way.over = True
        if new:
            self.forget(session)
            self._over_unknown.add(session, self._me, way.generation)

    def of_step(self, sender: str, frame: StepFrame, admitted: Callable[[SessionRoute], None]) -> SessionRoute | None:
        """The way of a step that may be taken in; remembered if the step brings it, and `admitted` is told of it then.
        None for a stale one: late, repeated, or of a generation that is over.

        Raises what a step is refused with.
        """
        known = self._ways.get(frame.session)
        way = self._brought(sender, frame, known) if frame.route else self._known(sender, frame, known)
        if way is None or way.over or frame.start <= way.last_start:
            return None
        way.used = self._clock()
        if way is not known:
            admitted(way)
            if known is not None:
                self._count(known, -1)
            self._count(way, 1)
            self._ways[frame.session] = way
        return way

    def _brought(self, sender: str, frame: StepFrame, known: SessionRoute | None) -> SessionRoute | None:
        """The way that a step brings: a new one, or the one that an earlier chunk of its generation brought."""
        way = SessionRoute.of(sender, frame)
        self._admit(sender, frame.session, way, known)
        way.asked = self._clamped(way)
        if known is None:
            over = self._over.holds(frame.session, way) or self._over_unknown.holds(frame.session, way)
            return None if over else way
        if way.generation < known.generation or way.generation <= known.cancelled:
            return None
        if way.generation > known.generation:
            way.goes_on_from(known)
            return way
        if (way.route, way.hop) != (known.route, known.hop):
            raise InvalidSetting("route", "a generation of a session keeps its route")
        known.settings = way.settings or known.settings
        return known

    def _clamped(self, way: SessionRoute) -> int:
        """When the answer was asked for. The first server of a route stamps its arrival, and all go by that; a later one believes a
        stamp of the last two minutes, so that nobody gains more by posing as the first."""
        now = int(self._wall_clock() * 1000)
        return now if way.hop == 0 else max(way.claimed, now - _OLDEST_ASKED)

    def _known(self, sender: str, frame: StepFrame, known: SessionRoute | None) -> SessionRoute | None:
        """The way of a step that goes round the ring."""
        if known is None:
            raise ServerFault("this server does not know the session's route")
        if sender != known.before and (known.hop or sender != known.route[-1].peer):
            raise Unauthorized(f"peer {sender} is not on the session's route")
        return None if frame.generation < known.generation else known

    def _admit(self, sender: str, session: str, way: SessionRoute, known: SessionRoute | None) -> None:
        if way.route[way.hop].peer != self._me or sender != way.before:
            raise Unauthorized("the step did not come the way that it names")
        if len({hop.peer for hop in way.route}) < len(way.route) or len(way.route) > self._blocks:
            raise InvalidSetting("route", "a route goes to each server once, and to no more servers than the model has blocks")
        own = self._span
        if not (own.start <= way.span.start and way.span.end <= own.end):
            if way.span.end > self._blocks:
                raise InvalidSetting("route", f"blocks {way.span} are not among the {self._blocks} of this model")
            raise NetworkError(f"this server holds blocks {own} and not {way.span}: it may have moved since its record was read")
        if known is not None:
            if way.client != known.client:
                raise Unauthorized("the session belongs to another client")
            return
        if self.leaving:
            raise NetworkError("this server is leaving, and takes no new sessions")
        # Counted by who brings them, too: a peer that names another's client takes none of its places.
        of_client, of_server = self._of_client[way.client, way.before], self._of_sender[way.before]
        config = self._config
        if len(self._ways) >= config.sessions or of_client >= config.sessions_per_client or of_server >= config.sessions_per_server:
            raise Busy(config.retry_after)

    def _forget(self, session: str) -> None:
        self._count(self._ways.pop(session), -1)

    def _count(self, way: SessionRoute, by: int) -> None:
        client = way.client, way.before
        self._of_client[client] += by
        self._of_sender[way.before] += by
        if not self._of_client[client]:
            del self._of_client[client]
        if not self._of_sender[way.before]:
            del self._of_sender[way.before]
