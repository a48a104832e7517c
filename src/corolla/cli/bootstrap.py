"""`corolla bootstrap`: a node that others join through, and nothing else."""

from __future__ import annotations

import sys

from corolla.cli import logs, options
from corolla.cli.addresses import check_addresses
from corolla.cli.logs import LogLevel
from corolla.cli.opening import secret_bytes
from corolla.cli.serve import join_line, until_told_to_end, write_whole


def bootstrap(
    peers: options.Peers = None,
    secret: options.Secret = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 0,
    identity: options.IdentityFile = None,
    ready_file: options.ReadyFile = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Run a node of the directory alone, until Ctrl-C or SIGTERM: an address that stays while servers come and go."""
    key = secret_bytes(secret)
    logs.set_up(log_level, swarm=True)
    joined = check_addresses(peers)

    from corolla.swarm.peer import PeerConfig, SwarmPeer

    with until_told_to_end() as signals:
        memory = None if identity is None else identity.with_name(f"{identity.name}.peers")
        peer = SwarmPeer(PeerConfig(initial_peers=joined, host=host, port=port, identity=identity, secret=key, memory=memory))
        try:
            if ready_file is not None:
                write_whole(ready_file, "\n".join(peer.addresses) + "\n")
            print("ready; a server joins with", file=sys.stderr)
            print(join_line("MODEL", peer.addresses, secret=key is not None), flush=True)
            signals.told.wait()
        finally:
            peer.close()
