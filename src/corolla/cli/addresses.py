"""Addresses of peers as they are typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corolla.errors import InvalidSetting

_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")


@dataclass(frozen=True, slots=True)
class Address:
    """A peer's multiaddr `text`: its `host` and TCP `port` (None over another transport or a relay), and its id."""

    text: str
    host: str
    port: int | None
    peer: str


def parse_address(text: str) -> Address:
    """A multiaddr that ends with a peer's id. Raises `InvalidSetting`."""
    from hivemind.utils.multiaddr import Multiaddr

    try:
        parts = [(protocol.name, value) for protocol, value in Multiaddr(text).items()]
    except ValueError as error:
        raise _no_address(text, f" ({error})" if text.startswith("/") else "") from error
    if len(parts) > 1 and parts[0][0] == "ip6zone":  # of an address that only this network has: fe80::1%eth0
        parts[:2] = [(parts[1][0], f"{parts[1][1]}%{parts[0][1]}")]
    names = [name for name, _ in parts]
    if not parts or names[0] not in _HOSTS:
        raise _no_address(text, "")
    if names[-1] != "p2p":
        raise _no_address(text, ": it lacks the peer's id at its end")
    direct = len(parts) == 3 and names[1] == "tcp"
    return Address(text, parts[0][1], int(parts[1][1]) if direct else None, parts[-1][1])


def check_addresses(peers: Sequence[str] | None) -> list[str]:
    """The addresses, each of which can be dialled as far as one can see. Raises `InvalidSetting` for the first that cannot."""
    return [parse_address(text).text for text in peers or ()]


def _no_address(text: str, problem: str) -> InvalidSetting:
    return InvalidSetting(
        "peers", f"{text!r} is no address of a peer{problem}; they look like /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo..., as serve prints them"
    )
