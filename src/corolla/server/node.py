"""A span offered to the swarm: steps come in, go through the engine, and leave for the next server of their route.

The tokens' way: the first server embeds, hidden states go from server to server, the last one samples. A sampled token goes
to the client and, at the same time, straight back to the first server (the ring): the client is not on the critical path.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from corolla.engine.engine import Engine
from corolla.errors import CorollaError, NetworkError, ServerFault
from corolla.swarm.arrays import check_finite
from corolla.swarm.convert import failed_of, from_reply, from_step, to_message, to_step
from corolla.swarm.network import Network
from corolla.swarm.wire import CancelFrame, CloseFrame, Hop, Ping, Pong, StepFrame, WireDtype, WireMessage
from corolla.types import Close, Hidden, Reply, Span, Step, Token

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Way:
    """How a session goes on from here; sent with its first step and remembered."""

    generation: int
    route: tuple[Hop, ...]
    hop: int
    client: str

    @property
    def span(self) -> Span:
        """The blocks to compute here."""
        here = self.route[self.hop]
        return Span(here.start, here.end)


class SpanServer:
    """Serves one engine's span over a network until `close`.

    Args:
        wire_dtype: of the hidden states that it sends on; that of the model where the answer must not depend on the route.
    """

    def __init__(self, engine: Engine, network: Network, wire_dtype: WireDtype) -> None:
        self._engine, self._network, self._wire_dtype = engine, network, wire_dtype
        self._ways: dict[str, _Way] = {}
        network.listen(self._receive, self._lose)

    def close(self) -> None:
        """Leave the network and stop the engine."""
        self._network.close()
        self._engine.stop()

    def _receive(self, sender: str, message: WireMessage) -> None:
        if isinstance(message, StepFrame):
            self._step(sender, message)
        elif isinstance(message, (CancelFrame, CloseFrame)):
            self._engine.receive(to_message(message))
            if isinstance(message, CloseFrame):
                self._ways.pop(message.session, None)
        elif isinstance(message, Ping):
            self._send(sender, Pong(message.nonce))

    def _lose(self, peer: str) -> None:
        """The sessions of a client that is gone are closed; of a server that is gone, its sessions' clients are told."""
        for session, way in list(self._ways.items()):
            if way.client == peer:
                del self._ways[session]
                self._engine.receive(Close(session))
            elif any(hop.peer == peer for hop in way.route):
                gone = NetworkError("the servers before or behind it cannot reach it")
                self._send(way.client, failed_of(gone, session, way.generation, peer=peer))

    def _step(self, sender: str, frame: StepFrame) -> None:
        client = frame.client or sender
        try:
            way = self._way(frame)
            client = way.client
            step = to_step(frame)
            if isinstance(step.payload, torch.Tensor):
                check_finite(step.payload)
            # Only the head samples; the servers before it pass the settings on.
            mine = replace(step, span=way.span, settings=step.settings if way.hop == len(way.route) - 1 else None)
            tells_way = bool(frame.route)
            self._engine.receive(mine, lambda reply: self._reply(way, step, reply, tells_way=tells_way))
        except CorollaError as error:
            self._send(client, failed_of(error, frame.session, frame.generation, peer=self._network.me))

    def _way(self, frame: StepFrame) -> _Way:
        known = self._ways.get(frame.session)
        if not frame.route:
            if known is None or known.generation != frame.generation:
                raise ServerFault("this server does not know the session's route")
            return known
        if known is not None and known.generation > frame.generation:
            raise ServerFault("a later step of the session came before this one")
        way = self._ways[frame.session] = _Way(frame.generation, frame.route, frame.hop, frame.client)
        return way

    # On the engine's thread from here on.

    def _reply(self, way: _Way, step: Step, reply: Reply, *, tells_way: bool) -> None:
        if isinstance(reply, Hidden):
            self._pass_on(way, step, reply, tells_way=tells_way)
            return
        if isinstance(reply, Token) and reply.finish is None and len(way.route) > 1:
            self._close_ring(way, step, reply)
        self._send(way.client, from_reply(reply, peer=self._network.me))

    def _pass_on(self, way: _Way, step: Step, reply: Hidden, *, tells_way: bool) -> None:
        """The rows that are computed so far go to the next server; it samples after the last of them."""
        onward = replace(step, start=reply.start, payload=reply.hidden, tokens=reply.tokens, settings=step.settings if reply.last else None)
        hop = way.hop + 1
        if tells_way:
            frame = from_step(onward, wire_dtype=self._wire_dtype, route=way.route, hop=hop, client=way.client)
        else:
            frame = from_step(onward, wire_dtype=self._wire_dtype)
        self._send(way.route[hop].peer, frame)

    def _close_ring(self, way: _Way, step: Step, token: Token) -> None:
        settings = step.settings
        assert settings is not None, "a token was sampled for a step without settings"
        left = replace(settings, max_tokens_to_generate=settings.max_tokens_to_generate - 1)
        again = Step(step.session, token.position, (token.token_id,), step.generation, left, step.adapter)
        self._send(way.route[0].peer, from_step(again))

    def _send(self, peer: str, message: WireMessage) -> None:
        try:
            self._network.send(peer, message)
        except NetworkError as error:  # this server is leaving
            log.info("a message to %s was not sent: %s", peer, error)
