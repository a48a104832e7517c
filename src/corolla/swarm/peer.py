"""This process as a peer of a swarm: one hivemind node, and over it the network of frames and the directory."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corolla.barrier import barrier
from corolla.errors import NetworkError
from corolla.swarm.connection import P2PConfig
from corolla.swarm.directory import HivemindDirectory
from corolla.swarm.hosts import announced_addresses, listen_addresses
from corolla.swarm.p2p import P2PNetwork
from corolla.swarm.records import ServerRecord

_DEADLINE = 30.0  # seconds for one operation of the directory
_UNREACHABLE_AGAIN, _REACHABLE_AGAIN = 15.0, 300.0  # seconds until others are asked again whether they can dial this peer
_UNREACHABLE = (
    "other peers cannot dial this one at %s: listen with --host 0.0.0.0 where it is 127.0.0.1, open the port in the firewall, or forward "
    "it in the router and give --announce its address. Until then nothing is sent here"
)
_SILENCE = 60.0  # seconds without an answer of the DHT's process, after which it is taken for dead
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    initial_peers: Sequence[str] = ()  # multiaddrs to join through; none starts a swarm
    host: str = "127.0.0.1"  # of this machine, to listen at: an address or a name; 0.0.0.0 for all of IPv4, :: for all
    port: int = 0  # any
    announce: Sequence[str] = ()  # multiaddrs to tell others in place of those it listens at: of a forwarded port, say
    identity: Path | None = None  # the key file that makes the peer's id last; a new id where None
    secret: bytes | None = None  # that every peer must know; None is an open swarm
    client_mode: bool = False  # holds nothing for others and answers no dial
    stay_every: float = 10.0  # seconds between two looks at whether the initial peers know this one
    memory: Path | None = None  # a file of peers that were met, to find them after a restart


class SwarmPeer:
    """A peer, from now until `close`. Make it before threads and models: hivemind forks a process of its own.

    Attributes:
        addresses: the multiaddrs that others join through.
        reachable: whether others can dial this peer there, as some found that it asked; None where nobody could tell, as for one
            that is alone or only asks.

    Raises `NetworkError` when none of the initial peers can be reached, `InvalidSetting` for a key file that holds no key, a host
    that is not this machine's, a port that is taken and an address to announce that nobody can dial.
    """

    def __init__(self, config: PeerConfig) -> None:
        from hivemind.dht.protocol import ValidationError
        from hivemind.p2p import P2PDaemonError

        from corolla.swarm.dht import Node
        from corolla.swarm.membership import Members
        from corolla.swarm.signatures import Identity, SignedEntries

        hosts, announced = listen_addresses(config.host, config.port), announced_addresses(config.announce)
        logging.getLogger("hivemind").setLevel(logging.WARNING)  # else it reports every start on standard error
        self._directory_of_key = tempfile.TemporaryDirectory(prefix="corolla-")
        key = config.identity or Path(self._directory_of_key.name) / "identity"
        entries = SignedEntries(Identity.load(key), config.secret)
        try:
            self._dht = Node(
                config.initial_peers,
                stay_every=config.stay_every,
                memory=config.memory,
                host_maddrs=hosts,
                announce_maddrs=announced or None,
                identity_path=str(key),
                record_validators=[entries],
                authorizer=None if config.secret is None else Members(config.secret),
                client_mode=config.client_mode,
                check_if_identity_free=config.identity is not None,  # a key made just now is nobody else's
                start=True,
            )
        except (P2PDaemonError, ValidationError, RuntimeError, OSError) as error:
            self._directory_of_key.cleanup()
            through = ", ".join(config.initial_peers) or f"{config.host}:{config.port}"
            silent = "nobody there answers; is the peer running, and do both sides have the same secret?"
            reason = silent if "none of the initial_peers responded" in str(error) else error
            hint = f"; `corolla doctor --peers {config.initial_peers[0]}` tells why" if config.initial_peers else ""
            raise NetworkError(f"no swarm could be joined through {through}: {reason}{hint}") from error
        self.addresses = self._dht.visible_addresses()
        self.network = P2PNetwork(self._dht, P2PConfig(secret=config.secret))
        self._directory = HivemindDirectory(self._dht, entries)
        self.reachable: bool | None = None
        if not config.client_mode:
            self.network.keep_running(self._look_whether_reachable())

    async def _look_whether_reachable(self) -> None:
        while True:
            with barrier("asking whether this peer is reachable"):
                before, self.reachable = self.reachable, await self._dht.reachable(self.addresses)
                if self.reachable is False and before is not False:
                    log.warning(_UNREACHABLE, ", ".join(self.addresses))
                elif self.reachable and before is False:
                    log.warning("other peers can dial this one now")
            await asyncio.sleep(_REACHABLE_AGAIN if self.reachable else _UNREACHABLE_AGAIN)

    @property
    def failure(self) -> str | None:
        """Why this peer is dead, if it is, in words: it is not healed but by a new process. Cheap, and for any thread."""
        if not self._dht.is_alive():
            return "this machine's DHT process or its libp2p daemon has ended"
        if self._directory.silent_for > _SILENCE:
            return f"this machine's DHT process has not answered for {self._directory.silent_for:.0f} s"
        return self.network.failure

    def servers(self, model: str | None = None) -> list[ServerRecord]:
        """Who serves a model, or any. Raises `DeadlineExceeded`, `NetworkError`."""
        records = self.network.run(self._directory.servers(model), _DEADLINE)
        self.network.know({record.peer: record.addresses for record in records})
        return records

    def models(self) -> list[str]:
        """The fingerprints of the models that are served, the most served first."""
        return self.network.run(self._directory.models(), _DEADLINE)

    def publish(self, record: ServerRecord) -> None:
        """Announce this server until the record expires."""
        self.network.run(self._directory.publish(record), _DEADLINE)

    def withdraw(self) -> None:
        """Announce this server no longer."""
        self.network.run(self._directory.withdraw(self.network.me), _DEADLINE)

    def close(self) -> None:
        """Leave the swarm."""
        self.network.close()
        self._dht.end()
        self._directory_of_key.cleanup()
