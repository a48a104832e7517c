"""A gateway as a process: uvicorn, its limits, and an end that lets answers finish."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from corolla.errors import InvalidSetting, NetworkError
from corolla.gateway.app import gateway_app
from corolla.gateway.database import Database
from corolla.gateway.keys import Keys
from corolla.gateway.model_registry import Models
from corolla.gateway.protocol import BoundedHTTP
from corolla.gateway.service import Gateway, GatewayConfig

_FILES = 4096  # that may be open, where the system's hard limit lets so many: each connection is one
_TICKS = 10  # of uvicorn's, ten a second, between two looks at the network
_FAREWELL = 5  # seconds for clients to be told how what they wait for has ended
_SOCKET_MESSAGE = 2 * 2**20  # bytes
log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_access(host: str, keys: Keys, *, open_to_all: bool, public_url: str | None = None) -> bool:
    """Whether nobody needs a key. Raises `InvalidSetting` where others could reach a gateway that has none."""
    if open_to_all:
        return True
    if keys.any():
        return False
    if public_url is not None or not is_loopback(host):
        raise InvalidSetting(
            "host", f"others reach {public_url or host}: make a key with `corolla keys create NAME`, or say that all may come with --open"
        )
    return True


def run(models: Models, database: Database, config: GatewayConfig, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends it at once. `ready` is told the page's address once it answers.

    On the main thread. Raises `NetworkError` when the address cannot be listened at, and when the swarm's network fails meanwhile.
    """
    _allow_files()
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"
    gateway = Gateway(models, database, config)
    settings = server_config(gateway)
    server = _Server(settings, gateway, lambda: ready(url))
    try:
        with asyncio.Runner(loop_factory=settings.get_loop_factory()) as runner:  # uvloop, where it is installed
            runner.run(server.serve([listening]))
    finally:
        gateway.tasks.interrupt()  # where a second signal left something
        listening.close()
    if server.failure is not None:
        raise NetworkError(f"the gateway ended, for its network had failed: {server.failure}")


def server_config(gateway: Gateway) -> uvicorn.Config:
    """uvicorn's settings for a gateway."""
    limits = gateway.config.connections
    return uvicorn.Config(
        gateway_app(gateway),
        http=partial(BoundedHTTP, limits),  # type: ignore[arg-type]
        ws="websockets-sansio",
        log_config=None,
        log_level="error",  # what clients do wrong is no warning, and strangers could fill the disk with them
        access_log=False,  # middleware.py writes a better one
        server_header=False,
        timeout_keep_alive=limits.idle,
        timeout_graceful_shutdown=round(gateway.config.drain) + _FAREWELL,
        ws_max_size=_SOCKET_MESSAGE,
        lifespan="on",
        proxy_headers=bool(limits.proxies),
        forwarded_allow_ips=list(limits.proxies),
    )


class _Server(uvicorn.Server):
    """Tells when it answers, and tells the gateway at once when it is to end; without a network it ends by itself."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._gateway, self._ready = gateway, ready
        self.failure: str | None = None  # of the network

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS == 0 and self.failure is None and (failure := self._gateway.network_failure) is not None:
            log.error("the swarm's network has failed, and this gateway ends: %s", failure)
            self.failure, self.should_exit = failure, True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("ending: answers under way have %g s", self._gateway.config.drain)
        self._gateway.begin_to_close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise NetworkError(f"{host}:{port} cannot be listened at ({error.strerror}): give another --host or --port") from None
    return listening
