"""What this machine's libp2p daemon is asked for when a peer is dialled.

hivemind does the same, the first of it not in public, and leaves its connection to the daemon open where a dial fails or is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hivemind.p2p import P2P, PeerID
    from hivemind.utils.multiaddr import Multiaddr


async def connect(p2p: P2P, peer: PeerID, addresses: Sequence[Multiaddr]) -> None:
    """Have the daemon connect to `peer`, if it is not connected; without a deadline of its own.

    Raises `P2PDaemonError` for a peer that does not answer there, `OSError` and `EOFError` without a daemon.
    """
    from hivemind.proto import p2pd_pb2

    wanted = p2pd_pb2.ConnectRequest(peer=peer.to_bytes(), addrs=[address.to_bytes() for address in addresses])
    _, writer = await _ask(p2p, p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=wanted))
    writer.close()


async def open_stream(p2p: P2P, peer: PeerID, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream to `peer`, dialled where the daemon finds it if it is not connected. The deadline and the errors are as `connect`'s."""
    from hivemind.proto import p2pd_pb2

    wanted = p2pd_pb2.StreamOpenRequest(peer=peer.to_bytes(), proto=[protocol])
    return await _ask(p2p, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=wanted))


async def _ask(p2p: P2P, request: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The connection to the daemon, once it has granted the request."""
    from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
    from hivemind.proto import p2pd_pb2

    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    granted = False
    try:
        await write_pbmsg(writer, request)
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        raise_if_failed(response)
        granted = True
        return reader, writer
    finally:
        if not granted:
            writer.close()
