from __future__ import annotations

import socket
import warnings

import pytest

from corolla.errors import InvalidSetting
from corolla.swarm.hosts import announced_addresses, is_loopback, listen_addresses

# hivemind scripts a function as it is imported, which torch 2.13 calls deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import hivemind  # noqa: F401


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", ["/ip4/127.0.0.1/tcp/0"]),
        ("0.0.0.0", ["/ip4/0.0.0.0/tcp/0"]),
        ("::1", ["/ip6/::1/tcp/0"]),
        ("[::1]", ["/ip6/::1/tcp/0"]),
        ("::", ["/ip6/::/tcp/0", "/ip4/0.0.0.0/tcp/0"]),
    ],
)
def test_a_host_is_listened_at(host: str, expected: list[str]) -> None:
    assert listen_addresses(host, 0) == expected


def test_a_name_is_resolved() -> None:
    found = listen_addresses("localhost", 0)
    assert "/ip4/127.0.0.1/tcp/0" in found or "/ip6/::1/tcp/0" in found


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no.such.host.invalid", "", "a b", "x" * 300])
def test_a_host_that_is_not_this_machine_s_is_refused_in_a_sentence(host: str) -> None:
    with pytest.raises(InvalidSetting, match="host"):
        listen_addresses(host, 0)


def test_a_port_that_is_taken_is_refused_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidSetting, match="another program has it"):
        listen_addresses("127.0.0.1", taken.getsockname()[1])


def test_an_address_to_announce_can_be_dialled() -> None:
    good = ["/ip4/203.0.113.5/tcp/4001", "/ip6/2001:db8::5/tcp/4001", "/dns4/example.org/tcp/4001"]
    assert announced_addresses(good) == good


@pytest.mark.parametrize("address", ["203.0.113.5:4001", "/ip4/203.0.113.5", "/ip4/1.2.3/tcp/1", "/ip4/203.0.113.5/tcp/0", "/unix/tmp", ""])
def test_an_address_that_nobody_can_dial_is_not_announced(address: str) -> None:
    with pytest.raises(InvalidSetting, match="announce"):
        announced_addresses([address])


def test_loopback_is_known_in_both_families() -> None:
    assert is_loopback("/ip4/127.0.0.1/tcp/1/p2p/Qm")
    assert is_loopback("/ip6/::1/tcp/1")
    assert not is_loopback("/ip6/::2/tcp/1")
