"""A gateway's parts, as its routes use them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import Depends
from starlette.requests import HTTPConnection, Request
from starlette.types import Receive

from corolla.errors import Interrupted
from corolla.gateway.conversations import Conversations
from corolla.gateway.database import Database
from corolla.gateway.fair_queue import FairQueue, QueueConfig, Rates
from corolla.gateway.generation_tasks import GenerationTask, TaskRunner
from corolla.gateway.keeping import Keeper
from corolla.gateway.keys import Caller, Keys
from corolla.gateway.metrics import Metrics
from corolla.gateway.middleware import AccessConfig
from corolla.gateway.model_registry import Models, ServedModel
from corolla.gateway.open_sessions import OpenSessions
from corolla.gateway.pool import PoolConfig, SessionPool
from corolla.gateway.prompt_library import PromptLibrary
from corolla.gateway.protocol import ConnectionLimits
from corolla.gateway.sse import KEEP_ALIVE_SECONDS

if TYPE_CHECKING:
    from corolla.models.prompts import SoftPrompt

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    access: AccessConfig = field(default_factory=AccessConfig)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    queue: QueueConfig = field(default_factory=QueueConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    debug: bool = False  # real tracebacks for clients
    keep_alive: float = KEEP_ALIVE_SECONDS  # of silent event streams
    first_token: float = 5.0  # seconds that a stream waits for its first token before it says 200
    token_timeout: float = 120.0  # seconds for one token, whatever happens meanwhile
    drain: float = 30.0  # seconds for answers to be finished when the gateway is told to end
    prompts: Path | None = None  # a directory of soft prompts
    join: str = ""  # the address that others join the swarm through
    secret: bool = False  # whether they need to know one


class Gateway:
    """What the routes share. Made and closed in the event loop; `database` stays open."""

    def __init__(self, models: Models, database: Database, config: GatewayConfig) -> None:
        self.models, self.database, self.config = models, database, config
        self.keys = Keys(database)
        self.conversations = Conversations(database)
        self.keeper = Keeper(self.conversations)
        self.metrics = Metrics()
        self.queue = FairQueue(config.queue)
        self.tasks = TaskRunner(self.queue, SessionPool(config.pool), self.metrics, timeout=config.token_timeout)
        self.rates = Rates()
        self.sessions = OpenSessions()
        self.prompts = PromptLibrary(config.prompts, models)
        self._deadline = 0.0
        self.closing = asyncio.Event()  # told to end: event streams that would never end do
        self.metrics.watch(self._gauges)

    def _gauges(self) -> dict[str, float]:
        missing = sum(len(span) for model in self.models for span in model.missing)
        counted: dict[str, float] = {}
        for model in self.models:
            for name, count in model.counters().items():
                counted[f"swarm_{name}"] = counted.get(f"swarm_{name}", 0) + count
        return {
            "streams": self.queue.active,
            "waiting": self.queue.waiting,
            "sessions": self.tasks.pool.size,
            "blocks_missing": missing,
            **counted,
        }

    @property
    def network_failure(self) -> str | None:
        """Why no server can be reached any more, until this process begins anew."""
        return next((failure for model in self.models if (failure := model.failure()) is not None), None)

    @property
    def faults(self) -> list[str]:
        """Why no answer, or not each one, can be given now: sentences for anybody to read."""
        found = ["the gateway is about to end"] if self.closing.is_set() else []
        for model in self.models:
            if model.missing:
                found.append(f"blocks {', '.join(map(str, model.missing))} of {model.name} are held by no server that is ready")
        if self.network_failure is not None:
            found.append("the swarm's network has failed: the gateway's log says more")
        if self.keeper.failure is not None:
            found.append("the database does not answer")
        return found

    async def soft_prompt(self, name: str | None, model: ServedModel) -> SoftPrompt | None:
        """The soft prompt of that name. Raises `InvalidSetting` where the model has none."""
        return None if name is None else await asyncio.to_thread(self.prompts.get, name, model)

    @staticmethod
    def new_seed() -> int:
        """For an answer that names none."""
        return secrets.randbelow(2**31)

    def begin_to_close(self) -> None:
        """Answers under way get their time to be finished, and others look elsewhere from now on. In the event loop.

        What is left then is interrupted while those who look on are still there to be told.
        """
        if not self.closing.is_set():
            self._deadline = time.monotonic() + self.config.drain
            asyncio.get_running_loop().call_later(self.config.drain, self.tasks.interrupt)
            self.closing.set()

    async def close(self) -> None:
        """Interrupt what is still under way when its time is over."""
        self.begin_to_close()
        await self.tasks.drain(self._deadline)
        self.sessions.close_all()
        await self.tasks.close()


def gateway_of(connection: HTTPConnection) -> Gateway:
    """The gateway that a request came to."""
    gateway: Gateway = connection.app.state.gateway
    return gateway


def caller_of(connection: HTTPConnection) -> Caller:
    """Whose request it is."""
    caller: Caller = connection.state.caller
    return caller


TheGateway = Annotated[Gateway, Depends(gateway_of)]
TheCaller = Annotated[Caller, Depends(caller_of)]


async def gone(receive: Receive) -> None:
    """Return when the client has gone away. Its request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[Result], *answers: GenerationTask) -> Result:
    """What `work` comes to. When the client goes away meanwhile the answers are stopped, and `Interrupted` is raised."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Interrupted
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            for answer in answers:
                answer.stop()
        await asyncio.gather(working, watching, return_exceptions=True)
