"""`corolla bootstrap`: a node that others join through, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli import logs, options
from corolla.cli.addresses import check_addresses
from corolla.cli.logs import LogLevel
from corolla.cli.opening import secret_bytes
from corolla.cli.serve import farthest, until_told_to_end, write_whole


def bootstrap(
    peers: options.Peers = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free.")] = 0,
    secret: options.Secret = None,
    identity: Annotated[Path | None, typer.Option(help="A key file that keeps this node's id; made where it is missing.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Gets the addresses, a line each, once the node is ready.")] = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Run a node of the directory alone, until Ctrl-C or SIGTERM: an address that stays while servers come and go."""
    key = secret_bytes(secret)
    logs.set_up(log_level, swarm=True)
    joined = check_addresses(peers)

    from corolla.swarm.peer import PeerConfig, SwarmPeer

    with until_told_to_end() as told:
        peer = SwarmPeer(PeerConfig(initial_peers=joined, host=host, port=port, identity=identity, secret=key))
        try:
            if ready_file is not None:
                write_whole(ready_file, "\n".join(peer.addresses) + "\n")
            print("ready; a server joins with", file=sys.stderr)
            print(f"corolla serve MODEL --peers {farthest(peer.addresses)}", flush=True)
            told.wait()
        finally:
            peer.close()
