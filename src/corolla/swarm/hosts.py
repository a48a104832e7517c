"""Where a peer listens and what it tells others to dial: hosts as people write them, as libp2p's multiaddrs."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from corolla.errors import InvalidSetting

GREETING = b"\x13/multistream/1.0.0\n"  # that every libp2p peer begins with
_ALL = {"0.0.0.0": ("0.0.0.0",), "::": ("::", "0.0.0.0")}  # libp2p listens at :: for IPv6 alone


def listen_addresses(host: str, port: int) -> list[str]:
    """The multiaddrs to listen at: `host` is an address of this machine, IPv4 or IPv6, or a name; 0.0.0.0 is every IPv4 address of it,
    :: every address. A port of 0 is any that is free.

    Raises `InvalidSetting` for a host that is not this machine's and a port that is not free.
    """
    bare = host.removeprefix("[").removesuffix("]")
    found = [_listens(family, place, host, port) for each in _ALL.get(bare, (bare,)) for family, place in _places(each, port, host)]
    return list(dict.fromkeys(found))


def announced_addresses(addresses: Sequence[str]) -> list[str]:
    """The multiaddrs, each of which others can be told. Raises `InvalidSetting` for the first that cannot."""
    from hivemind.utils.multiaddr import Multiaddr

    for address in addresses:
        example = "they look like /ip4/203.0.113.5/tcp/4001, /ip6/2001:db8::5/tcp/4001 or /dns4/example.org/tcp/4001"
        try:
            parts = [(protocol.name, value) for protocol, value in Multiaddr(address).items()]
        except ValueError as error:
            raise InvalidSetting("announce", f"{address!r} is no address ({error}); {example}") from error
        names = [name for name, _ in parts]
        if len(parts) < 2 or not names[0].startswith(("ip", "dns")):
            raise InvalidSetting("announce", f"{address!r} is no address that others can dial; {example}")
        if any(name in ("tcp", "udp") and value == "0" for name, value in parts):
            raise InvalidSetting("announce", f"{address!r} has port 0: give the port that others dial")
    return list(addresses)


def is_loopback(address: str) -> bool:
    """Whether a multiaddr is reached by this machine alone."""
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def _places(host: str, port: int, written: str) -> list[tuple[int, tuple[object, ...]]]:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise InvalidSetting(
            "host", f"{written!r} has no address here ({error}); give one of this machine's, or 0.0.0.0 for all"
        ) from error
    return [(family, place) for family, _, _, _, place in infos if family in (socket.AF_INET, socket.AF_INET6)]


def _listens(family: int, place: tuple[object, ...], written: str, port: int) -> str:
    """The multiaddr of a place that can be listened at."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(place)
            probe.listen(1)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "another program has it" if error.errno == errno.EADDRINUSE else "this user may not listen there"
            raise InvalidSetting("port", f"{port} cannot be listened at: {why}; give another, or 0 for any that is free") from error
        raise InvalidSetting("host", f"{written!r} is no address of this machine ({error.strerror}); 0.0.0.0 is all of its") from error
    if family == socket.AF_INET:
        return f"/ip4/{place[0]}/tcp/{port}"
    address, _, zone = str(place[0]).partition("%")
    return f"/ip6zone/{zone}/ip6/{address}/tcp/{port}" if zone else f"/ip6/{address}/tcp/{port}"
