"""The ways of a server's sessions: who may bring a step, where it goes on, and which sessions are over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.errors import Busy, InvalidSetting, NetworkError, ServerFault, Unauthorized
from corolla.swarm.convert import to_prompt_name, to_settings
from corolla.swarm.wire import CancelFrame, CloseFrame, Hop, StepFrame
from corolla.types import GenerationSettings, PromptName, Span

if TYPE_CHECKING:
    from corolla.server.node import SpanServerConfig

_REMEMBERED = 4096  # closed sessions, whose late steps are refused
_FOR_EVER = 2**63 - 1  # a generation that none comes after


@dataclass(slots=True, eq=False)
class Way:
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

    @classmethod
    def of(cls, sender: str, frame: StepFrame) -> Way:
        """The way that a step of `sender` brings. Raises `InvalidSetting` for settings outside their ranges."""
        return cls(
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


class Closed:
    """The sessions that ended last, each with the latest generation that is over."""

    def __init__(self) -> None:
        self._ended: OrderedDict[tuple[str, str], int] = OrderedDict()  # by session and who said so

    def add(self, session: str, sender: str, generation: int | None) -> None:
        """`sender` says that it is over, up to a generation."""
        last = _FOR_EVER if generation is None else generation
        self._ended[session, sender] = max(last, self._ended.pop((session, sender), -1))
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def holds(self, session: str, way: Way) -> bool:
        """Whether somebody on this way said that it is over."""
        who = (way.client, *(hop.peer for hop in way.route))
        return any(self._ended.get((session, peer), -1) >= way.generation for peer in who)


class Ways:
    """On the network's thread, but for `len` and `clients`.

    Args:
        me: this server's id.
        span: the blocks that it holds, of `blocks` of the model.
    """

    def __init__(self, me: str, span: Span, blocks: int, config: SpanServerConfig) -> None:
        self._me, self._span, self._blocks, self._config = me, span, blocks, config
        self._ways: dict[str, Way] = {}
        # Apart, so that nobody pushes out what is known with sessions that never were.
        self._closed, self._closed_unknown = Closed(), Closed()
        self.leaving = False  # no new session is taken

    def __len__(self) -> int:
        return len(self._ways)

    @property
    def clients(self) -> set[str]:
        return {way.client for way in list(self._ways.values())}

    def get(self, session: str) -> Way | None:
        return self._ways.get(session)

    def forget(self, session: str) -> None:
        """As if it had never come."""
        self._ways.pop(session, None)

    def lose(self, peer: str) -> tuple[list[str], list[tuple[str, Way]]]:
        """Forget the sessions of a client that is gone. Returns them, and those that go by a server of that id."""
        gone = [session for session, way in self._ways.items() if way.client == peer]
        for session in gone:
            del self._ways[session]
        return gone, [(session, way) for session, way in self._ways.items() if way.passes(peer)]

    def end(self, sender: str, frame: CancelFrame | CloseFrame) -> bool:
        """Whether the engine is told that an answer or a session ends, as by somebody who may say so.

        A close may overtake the session's first step, which comes another way: then that is refused.
        """
        way = self._ways.get(frame.session)
        if way is None:
            if isinstance(frame, CloseFrame):
                self._closed_unknown.add(frame.session, sender, frame.generation)
            return False
        if sender != way.client and not way.passes(sender):
            return False
        if isinstance(frame, CloseFrame):
            self._closed.add(frame.session, sender, frame.generation)
            if frame.generation is None or way.generation <= frame.generation:
                del self._ways[frame.session]
        return True

    def of_step(self, sender: str, frame: StepFrame, admitted: Callable[[Way], None]) -> Way:
        """The way of a step that may be taken in; remembered if the step brings it, and `admitted` is told of it then.

        Raises what a step is refused with.
        """
        known = self._ways.get(frame.session)
        if frame.route:
            way = Way.of(sender, frame)
            self._admit(sender, frame.session, way, known)
            admitted(way)
            self._ways[frame.session] = way
            return way
        if known is None:
            raise ServerFault("this server does not know the session's route")
        if sender not in (known.before, known.route[-1].peer):
            raise Unauthorized(f"peer {sender} is not on the session's route")
        return known

    def _admit(self, sender: str, session: str, way: Way, known: Way | None) -> None:
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
            if way.generation < known.generation:
                raise ServerFault("a later step of the session came before this one")
            return
        if self._closed.holds(session, way) or self._closed_unknown.holds(session, way):
            raise Unauthorized("the session was closed while the step was on its way")
        if self.leaving:
            raise NetworkError("this server is leaving, and takes no new sessions")
        # Counted by who brings them, too: a peer that names another's client takes none of its places.
        of_client = sum((other.client, other.before) == (way.client, way.before) for other in self._ways.values())
        of_server = sum(other.before == way.before for other in self._ways.values())
        config = self._config
        if len(self._ways) >= config.sessions or of_client >= config.sessions_per_client or of_server >= config.sessions_per_server:
            raise Busy(config.retry_after)
