"""Why a swarm cannot be reached: one layer after the other is tried, from the address as it is typed to every server's stream."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from corolla.cli.addresses import Address, parse_address
from corolla.cli.findings import Finding, Verdict
from corolla.errors import InvalidSetting, NetworkError
from corolla.swarm.hosts import GREETING

if TYPE_CHECKING:
    from hivemind.dht import DHTNode
    from hivemind.p2p import P2P

    from corolla.swarm.network import Network
    from corolla.swarm.records import ServerRecord

_TIMEOUT = 5.0  # seconds for a connection, a greeting, a server's pong
_DAEMON_TIMEOUT = 30.0  # seconds for one operation of libp2p's daemon
_OTHER_PEER = re.compile(r"peer id mismatch: expected \w+, but remote key matches (\w+)")
_CLOCKS = re.compile(r"local: ([\d.]+), peer: ([\d.]+)")
_NOBODY = Finding("directory", "it answers and no server is announced", Verdict.BROKEN, "start one: corolla serve MODEL --peers ADDRESS")


def examine_swarm(peers: Sequence[str], secret: bytes | None) -> Iterator[Finding]:
    """Everything between this machine and the swarm's servers, one finding each; it ends at what stands in the way."""
    there = []
    for text in peers:
        try:
            address = parse_address(text)
        except InvalidSetting as error:
            yield Finding("address", text, Verdict.BROKEN, str(error).partition(": ")[2])
            continue
        found = reach(address)
        yield found
        if not found.fatal:
            there.append(address)
    if not there:
        return
    findings, joinable = asyncio.run(_meeting(there, secret))
    yield from findings
    if joinable:
        yield from _servers(joinable, secret)


# With nothing but sockets.


def reach(address: Address, timeout: float = _TIMEOUT) -> Finding:
    """Whether a libp2p peer listens at the address's host and port; `timeout` in seconds is for the connection and for its greeting."""
    place = f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
    if address.port is None:
        return Finding("port", f"{address.text} is not plain TCP: only libp2p can try it")
    try:
        with socket.create_connection((address.host, address.port), timeout) as connection:
            greeting = _greeting(connection)
    except socket.gaierror as error:
        advice = "is the name spelt right, and does this machine's DNS work? an IP address does without"
        return Finding("host", f"{address.host} has no address here ({error.strerror})", Verdict.BROKEN, advice)
    except ConnectionRefusedError:
        return Finding("port", f"{place} refuses: the machine is there and nothing listens at that port", Verdict.BROKEN, _nobody(address))
    except TimeoutError:
        advice = "the machine is off, or a firewall or router drops it: open or forward the port"
        return Finding("port", f"{place} did not answer within {timeout:g} s", Verdict.BROKEN, advice)
    except OSError as error:
        advice = "is the address right, and is this machine in the same network, or in its VPN?"
        return Finding("host", f"there is no way to {place} ({error.strerror})", Verdict.BROKEN, advice)
    if greeting == GREETING:
        return Finding("port", f"a libp2p peer listens at {place}")
    if greeting is None:
        advice = "another program has that port, or the peer hangs: start it again, and take the address that it prints then"
        return Finding("port", f"{place} takes connections and says nothing", Verdict.BROKEN, advice)
    advice = "another program has that port: take the address that the peer prints"
    return Finding("port", f"what listens at {place} is no libp2p peer", Verdict.BROKEN, advice)


def _greeting(connection: socket.socket) -> bytes | None:
    """The first bytes that come back, None where none do."""
    received = b""
    try:
        connection.sendall(GREETING)
        while len(received) < len(GREETING) and (more := connection.recv(len(GREETING) - len(received))):
            received += more
    except TimeoutError:
        return received or None
    except OSError:  # it hung up on the greeting
        return received
    return received


def _nobody(address: Address) -> str:
    try:
        here = ipaddress.ip_address(address.host.partition("%")[0]).is_loopback
    except ValueError:
        here = address.host == "localhost"
    if here:
        return f"{address.host} is this machine itself: if the peer runs on another, start it with --host 0.0.0.0 and take what it prints"
    return "is the peer running? it prints its address; one started with --host 127.0.0.1 (the default) is not seen by other machines"


# With libp2p and the DHT, in this process.


async def _meeting(addresses: Sequence[Address], secret: bytes | None) -> tuple[list[Finding], list[str]]:
    try:
        return await _meet(addresses, secret)
    finally:
        gc.collect()  # hivemind leaves streams to its daemon open, which complain when they outlive the event loop
        await asyncio.sleep(0)


async def _meet(addresses: Sequence[Address], secret: bytes | None) -> tuple[list[Finding], list[str]]:
    """What the peers are and what their directory says; and the addresses to join through, if that makes sense."""
    from hivemind.p2p import P2P, P2PDaemonError

    async with AsyncExitStack() as stack:
        try:
            p2p = await P2P.create(dht_mode="client")
        except P2PDaemonError as error:
            advice = "does the processor and the system fit hivemind's wheel? reinstall it: pip install --force-reinstall hivemind"
            return [Finding("libp2p", f"its daemon does not start here ({error})", Verdict.BROKEN, advice)], []
        stack.push_async_callback(p2p.shutdown)
        findings = [await _dial(p2p, address) for address in addresses]
        there = [address.text for address, found in zip(addresses, findings, strict=True) if not found.fatal]
        if not there:
            return findings, []
        node, found = await _join(p2p, there, secret)
        findings += found
        if node is None:
            return findings, []
        stack.push_async_callback(node.shutdown)
        findings.append(await _directory(node))
        return findings, [] if findings[-1].fatal else there


async def _dial(p2p: P2P, address: Address) -> Finding:
    """Whether the peer at the address has the id that the address names."""
    from hivemind.p2p import PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
    from hivemind.utils.multiaddr import Multiaddr

    from corolla.swarm.dialling import connect

    way = Multiaddr(address.text.rpartition("/p2p/")[0])
    try:
        async with asyncio.timeout(_DAEMON_TIMEOUT):
            await connect(p2p, PeerID.from_base58(address.peer), [way])
    except (ControlFailure, TimeoutError) as error:
        if other := _OTHER_PEER.search(str(error)):
            advice = f"it was started again with a new id (--identity keeps one), or it is another swarm's: {way}/p2p/{other[1]}"
            return Finding("peer", f"another peer answers there than {address.peer}", Verdict.BROKEN, advice)
        reason = str(error).strip().splitlines()[-1].strip(" *") if str(error) else f"no answer within {_DAEMON_TIMEOUT:g} s"
        return Finding(
            "peer", f"{address.peer} cannot be dialled: {reason}", Verdict.BROKEN, "start the peer again; is its Corolla up to date?"
        )
    return Finding("peer", f"{address.peer} answers")


async def _join(p2p: P2P, peers: list[str], secret: bytes | None) -> tuple[DHTNode | None, list[Finding]]:
    """A node of the swarm's DHT that only asks."""
    from hivemind.dht import DHTNode
    from hivemind.dht.protocol import ValidationError

    from corolla.swarm.membership import Members

    authorizer = None if secret is None else Members(secret)
    try:
        node = await DHTNode.create(p2p=p2p, initial_peers=peers, client_mode=True, authorizer=authorizer)
    except ValidationError as error:
        clocks = _CLOCKS.search(str(error))
        if clocks is None:
            return None, [Finding("directory", str(error), Verdict.BROKEN, "is the peer's hivemind up to date?")]
        ahead = float(clocks[1]) - float(clocks[2])
        value = f"this machine's is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the peer's"
        return None, [Finding("clock", value, Verdict.BROKEN, "let both machines set their clocks (NTP): a swarm takes no more than 3 s")]
    except RuntimeError:
        return None, [await _silence(p2p, peers[0], secret)]
    return node, [Finding("clock", "as the peer's, to 3 s")]


async def _silence(p2p: P2P, address: str, secret: bytes | None) -> Finding:
    """Why a peer that can be dialled answers no question to the directory."""
    from hivemind.p2p import P2PDaemonError, PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError

    from corolla.swarm.membership import is_closed

    try:
        closed = await is_closed(p2p, PeerID.from_base58(address.rpartition("/p2p/")[2]), _TIMEOUT)
    except (P2PDaemonError, P2PHandlerError, TimeoutError):
        advice = "it is another program's libp2p, or it hangs: start it again"
        return Finding("directory", "the peer answers no question to the swarm's directory", Verdict.BROKEN, advice)
    if not closed:
        return Finding("secret", "the swarm is open, and a secret was given", Verdict.BROKEN, "unset COROLLA_SECRET, or leave --secret out")
    if secret is None:
        return Finding("secret", "the swarm has a secret", Verdict.BROKEN, "set COROLLA_SECRET to it, or give --secret")
    return Finding("secret", "the swarm's secret is another", Verdict.BROKEN, "compare it with the servers': every letter and blank counts")


async def _directory(node: DHTNode) -> Finding:
    """Whether servers are announced."""
    from corolla.swarm.places import INDEX

    found = await node.get(INDEX, latest=True)
    entries = {} if found is None or not isinstance(found.value, dict) else found.value
    if not entries:
        return _NOBODY
    return Finding("directory", f"{len(entries)} server{'s are' if len(entries) != 1 else ' is'} announced")


# As a client.


def _servers(peers: list[str], secret: bytes | None) -> Iterator[Finding]:
    """Whether each announced server can be dialled, and what blocks that leaves."""
    from corolla.swarm.peer import PeerConfig, SwarmPeer

    try:
        peer = SwarmPeer(PeerConfig(initial_peers=peers, secret=secret, client_mode=True))
    except NetworkError as error:
        yield Finding("swarm", str(error), Verdict.BROKEN, "try again: what answered a moment ago did not now")
        return
    try:
        records = peer.servers()
        answered = ping(peer.network, [record.peer for record in records])
    except NetworkError as error:
        yield Finding("directory", str(error), Verdict.BROKEN, "try again: what answered a moment ago did not now")
        return
    finally:
        peer.close()
    if not records:
        yield _NOBODY
    for record in records:
        yield _server(record, answered.get(record.peer, "it says nothing"))
    yield from blocks(records, {name for name, answer in answered.items() if isinstance(answer, float)})


def ping(network: Network, peers: Sequence[str]) -> dict[str, float | str]:
    """Seconds until each of the peers answered, the stream's opening included; or why it did not.

    It listens on `network` from now on. Raises `NetworkError` when that is closed.
    """
    from corolla.messages import Ping, Pong, WireMessage

    answers: dict[str, float | str] = {}
    everybody = threading.Event()

    def settle(peer: str, answer: float | str) -> None:
        if peer in peers:
            answers.setdefault(peer, answer)
        if len(answers) == len(peers):
            everybody.set()

    def receive(sender: str, message: WireMessage) -> None:
        if isinstance(message, Pong):
            settle(sender, time.monotonic() - began)

    began = time.monotonic()
    network.listen(receive, lambda peer: settle(peer, "it cannot be dialled"))
    for peer in peers:
        network.send(peer, Ping(0))
    if peers:
        everybody.wait(2 * _TIMEOUT)
    return {peer: answers.get(peer, f"it did not answer within {2 * _TIMEOUT:g} s") for peer in peers}


def _server(record: ServerRecord, answer: float | str) -> Finding:
    what = f"{record.name or record.peer[-8:]}, blocks {record.span}"
    if isinstance(answer, float):
        return Finding("server", f"{what}: answered in {answer * 1000:.0f} ms, {record.state}")
    if answer == "it cannot be dialled":
        advice = (
            "it died less than 20 s ago, or others cannot reach its address: start it with --host 0.0.0.0, behind a router with --announce"
        )
    else:
        advice = "it hangs, or its network does: start it again"
    return Finding("server", f"{what}: announced, and {answer}", Verdict.WEAK, advice)


def blocks(records: Sequence[ServerRecord], answering: set[str]) -> Iterator[Finding]:
    """For each model whether the servers that answer hold all its blocks."""
    from corolla.swarm.routing import gaps

    for model in sorted({record.model for record in records}):
        held = [record for record in records if record.model == model]
        count = held[0].blocks
        nobody = gaps(held, count)
        silent = gaps([record for record in held if record.peer in answering], count)
        name = f"model {model[:8]}"
        if nobody:
            spans = ", ".join(map(str, nobody))
            advice = f"start a server for each: corolla serve MODEL --peers ADDRESS --blocks {nobody[0]}"
            yield Finding(name, f"nobody holds blocks {spans} of {count}", Verdict.BROKEN, advice)
        elif silent:
            spans = ", ".join(map(str, silent))
            advice = "see the servers above, or start others that hold those blocks"
            yield Finding(name, f"no server that answers holds blocks {spans} of {count}", Verdict.BROKEN, advice)
        else:
            yield Finding(name, f"every one of its {count} blocks is held by a server that answers")
