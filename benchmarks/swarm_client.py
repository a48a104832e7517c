"""A client of a Corolla swarm behind a pipe, without weights, for swarm.py.

    python benchmarks/swarm_client.py DIRECTORY ADDRESS

One JSON request a line: {"prompts": [[token ids], ...], "new_tokens": n}, all prompts at once, a session and a thread each.
One JSON answer a line: {"answers": [{"token_ids": [...], "times": [...]}, ...]}, seconds from the request to each token,
chosen greedily. With "keep": NAME the one session stays, and what a later prompt shares with its history is not sent again.
With "ends": true an answer ends where the model ends it. With "say_at": k a line {"route": [peers]} comes first, when the one
session has k tokens.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from corolla.client.discovery import Joined, join_swarm
from corolla.client.link import SwarmLink
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import CorollaError
from corolla.swarm.peer import PeerConfig
from corolla.swarm.transport import Deliver
from corolla.types import GenerationSettings

TIMEOUT = 180.0  # seconds for one token
MAX_SESSIONS = 64  # at once


class Watched:
    """A transport that shows the link it made last."""

    def __init__(self, transport: SwarmTransport) -> None:
        self._transport = transport
        self.link: SwarmLink | None = None

    def connect(self, peer: str, deliver: Deliver) -> SwarmLink:
        self.link = self._transport.connect(peer, deliver)
        return self.link

    @property
    def route(self) -> list[str]:
        route = None if self.link is None else self.link.route
        return [] if route is None else list(route.peers)


class Client:
    """Answers requests with the sessions of one swarm."""

    def __init__(self, joined: Joined, pool: ThreadPoolExecutor) -> None:
        self._transport = Watched(joined.transport)
        self._end_ids = TextTokenizer(joined.directory).end_ids
        self._pool = pool
        self._kept: dict[str, Session] = {}

    def answers(
        self, prompts: list[list[int]], new_tokens: int, keep: str | None = None, say_at: int | None = None, ends: bool = False
    ) -> list[dict[str, Any]]:
        """A session each, at once. Raises what the first of them to fail raised."""
        sessions = [self._session(keep) for _ in prompts]
        began = time.perf_counter()
        try:
            settings = GenerationSettings(max_tokens_to_generate=new_tokens, stop_token_ids=self._end_ids if ends else ())
            running = [self._pool.submit(self._answer, *pair, settings, began, say_at) for pair in zip(sessions, prompts, strict=True)]
            return [answer.result() for answer in running]
        finally:
            if keep is not None:
                self._kept[keep] = sessions.pop()
            for session in sessions:
                session.close()

    def _session(self, name: str | None) -> Session:
        if name is not None and name in self._kept:
            return self._kept.pop(name)
        return Session(self._transport, "")

    def _answer(
        self, session: Session, prompt: list[int], settings: GenerationSettings, began: float, say_at: int | None
    ) -> dict[str, Any]:
        """What the session has of the prompt already is not sent again."""
        session.rollback(session.common_prefix(prompt))
        token_ids, times = [], []
        for token in session.generate(prompt[session.position :], settings, timeout=TIMEOUT):
            times.append(time.perf_counter() - began)
            token_ids.append(token.token_id)
            if len(times) == say_at:
                say(route=self._transport.route)
        return {"token_ids": token_ids, "times": times}


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    directory, address = sys.argv[1:]
    config = PeerConfig(initial_peers=[address], client_mode=True)
    with join_swarm(Path(directory), config) as joined, ThreadPoolExecutor(MAX_SESSIONS) as pool:
        client = Client(joined, pool)
        say(ready=True)
        for line in sys.stdin:
            try:
                say(answers=client.answers(**json.loads(line)))
            except CorollaError as error:
                say(error=repr(error))


if __name__ == "__main__":
    main()
