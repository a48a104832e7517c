"""What nobody expected in a client's own threads ends one session, and the client goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from corolla.barrier import unexpected
from corolla.client.patience import Patience
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.errors import CorollaError, NoRoute
from corolla.messages import Cancel, Close, FailedFrame, Hop, StepFrame, Token, WireMessage
from corolla.swarm.network import LocalHub
from corolla.swarm.routing import Route
from corolla.types import FinishReason, GenerationSettings, Span, Step
from tests.swarm.hostile import eventually

SETTINGS = GenerationSettings(max_tokens_to_generate=1)
TIMEOUT = 10.0


class Client:
    """Of one server in the hub, "s", that says what `answers` holds, and then a token. The client's router is fragile."""

    def __init__(self) -> None:
        self.hub = LocalHub()
        self.breaks = 0  # times that the router still fails when it is asked for another way
        self.answers: list[str] = []
        self.got: list[WireMessage] = []
        self.server = self.hub.join("s")
        self.server.listen(self._serve, lambda peer: None)
        self.slept = 0.0  # seconds that the process stood still
        patience = Patience(silence=0.1, answer=0.1, reconsider=0.0)
        self.transport = SwarmTransport(self.hub.join("client"), self, patience=patience, clock=lambda: time.monotonic() + self.slept)

    def route(self, avoid: Any, needed_tokens: int, like: Any = None, adapter: Any = None) -> Route:
        if "s" not in avoid:
            return Route((Hop("s", 0, 1),), 0.1)
        self._break()
        raise NoRoute((Span(0, 1),))

    def quicker(self, route: Route, avoid: Any, needed_tokens: int, adapter: Any = None) -> Route | None:
        self._break()
        return None

    def ask(self) -> list[int]:
        with Session(self.transport, "") as session:
            return [token.token_id for token in session.generate([5], SETTINGS, timeout=TIMEOUT)]

    def _break(self) -> None:
        if self.breaks:
            self.breaks -= 1
            raise KeyError("odd")

    def _serve(self, sender: str, message: WireMessage) -> None:
        self.got.append(message)
        if isinstance(message, StepFrame):
            said = self.answers.pop(0) if self.answers else "token"
            if said == "busy":
                self.server.send(sender, FailedFrame(message.session, message.generation, "Busy", "full", 0.1))
            elif said == "token":
                self.server.send(sender, Token(message.session, message.generation, 1, 7, -0.5, finish=FinishReason.LENGTH))


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.transport.close()


@pytest.mark.parametrize("said", ["busy", "nothing"])
def test_an_unexpected_error_ends_one_session(client: Client, said: str) -> None:
    """As a message is taken, and as the watch looks."""
    before = unexpected.total()
    client.breaks, client.answers = 1, [said]
    with pytest.raises(CorollaError, match="unexpected error in this client: KeyError"):
        client.ask()
    assert unexpected.total() == before + 1
    assert client.ask() == [7]


def test_replies_to_sessions_that_nobody_has_are_answered_by_their_end(client: Client) -> None:
    """Somebody opened them in this client's name, or they are of its earlier life."""
    client.server.send("client", Token("forged", 3, 1, 7, -0.5))
    eventually(lambda: Close("forged", 3) in client.got)
    assert client.ask() == [7]


def test_only_peers_that_were_heard_lately_are_remembered(client: Client) -> None:
    for number in range(5000):
        client.hub.join(str(number)).send("client", Cancel("s", 1))
    client.ask()
    assert client.transport.peers.heard("0") == float("-inf")
    assert client.transport.peers.heard("4999") > 0


@pytest.mark.parametrize("slept", [0.0, 60.0])
def test_connections_that_broke_while_this_process_slept_ban_nobody(client: Client, slept: float) -> None:
    link = client.transport.connect("", lambda reply: None)
    link.send(Step("session", 0, (5,), 1, SETTINGS))
    with closing(link):
        client.slept = slept
        client.hub.part("client", "s")
        eventually(lambda: link.route is None)
    assert client.transport.bans.banned() == (set() if slept else {"s"})
