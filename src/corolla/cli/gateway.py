"""`corolla gateway`: the page and the interfaces over HTTP, for a swarm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli import logs, options
from corolla.cli.addresses import check_addresses
from corolla.cli.logs import LogLevel
from corolla.cli.opening import secret_bytes
from corolla.cli.progress import showing_progress
from corolla.cli.serve import write_whole
from corolla.errors import InvalidSetting

HTTP = "HTTP"
LIMITS = "Limits"


def gateway(
    models: Annotated[
        list[str] | None, typer.Argument(help="What the swarm serves: aliases, directories or hub ids; smollm2 by default.")
    ] = None,
    peers: options.Peers = None,
    secret: options.Secret = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than loopback need keys.", rich_help_panel=HTTP)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.", rich_help_panel=HTTP)] = 8000,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Nobody needs a key, whoever reaches the address.", rich_help_panel=HTTP)
    ] = False,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Another site whose pages may call, as https://example.org; may be repeated.", rich_help_panel=HTTP
        ),
    ] = None,
    public_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where browsers find the page through a proxy, as https://chat.example.org; with https its cookies are Secure.",
            rich_help_panel=HTTP,
        ),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="That proxy's address, whose X-Forwarded-For is believed; may be repeated; with --public-url this machine's by default.",
            rich_help_panel=HTTP,
        ),
    ] = None,
    database: options.Database = None,
    prompts: Annotated[Path | None, typer.Option(metavar="DIR", help="Soft prompts that may be chosen: directories in it.")] = None,
    streams: Annotated[int, typer.Option(min=1, help="Answers that are written at a time.", rich_help_panel=LIMITS)] = 64,
    waiting: Annotated[
        int, typer.Option(min=0, help="Requests that wait for their turn; more are told to come back.", rich_help_panel=LIMITS)
    ] = 128,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds for answers to be finished when it is told to end.", rich_help_panel=LIMITS)
    ] = 30.0,
    debug: Annotated[bool, typer.Option("--debug", help="Give clients real tracebacks.")] = False,
    ready_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Gets the page's address once it answers.")] = None,
    log_level: options.LogLevel = LogLevel.INFO,
) -> None:
    """Answer over HTTP for a swarm: the page, OpenAI's interface and that of Petals Chat. It loads no weights.

    corolla gateway smollm2 --peers /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo...

    Without keys it is for this machine alone; `corolla keys create NAME` makes one. Ctrl-C or SIGTERM lets answers finish first.
    """
    if not peers:
        raise InvalidSetting("peers", "name a peer of the swarm with --peers; `corolla up` starts a swarm and a gateway together")
    key = secret_bytes(secret)
    logs.set_up(log_level, swarm=True)
    joined = check_addresses(peers)

    from corolla.gateway.database import Database, default_url
    from corolla.gateway.fair_queue import QueueConfig
    from corolla.gateway.keys import Keys
    from corolla.gateway.middleware import AccessConfig, checked_url
    from corolla.gateway.protocol import ConnectionLimits
    from corolla.gateway.serve import check_access, is_loopback, run
    from corolla.gateway.service import GatewayConfig
    from corolla.gateway.swarm_models import joined_models
    from corolla.models.catalog import resolve
    from corolla.swarm.peer import PeerConfig

    address = None if public_url is None else checked_url(public_url)
    proxies = tuple(proxy or ("127.0.0.1", "::1")) if proxy or address else ()
    kept = Database(database or default_url())
    try:
        free = check_access(host, Keys(kept), open_to_all=open_to_all, public_url=address)
        config = GatewayConfig(
            access=AccessConfig(open=free, loopback=is_loopback(host) and not open_to_all, origins=tuple(origin or ()), public_url=address),
            connections=ConnectionLimits(proxies=proxies),
            queue=QueueConfig(streams=streams, waiting=waiting, waiting_of_one=max(1, waiting * 3 // 4)),
            debug=debug,
            drain=drain,
            prompts=prompts,
            join=joined[0],
            secret=key is not None,
        )
        with showing_progress() as progress:
            directories = {name: resolve(name, weights=False, progress=progress) for name in models or ["smollm2"]}
        with joined_models(directories, PeerConfig(initial_peers=joined, secret=key, client_mode=True)) as served:

            def ready(url: str) -> None:
                if ready_file is not None:
                    write_whole(ready_file, f"{url}\n")
                print(f"the page: {url}", file=sys.stderr)

            run(served, kept, config, host, port, ready)
    finally:
        kept.close()
