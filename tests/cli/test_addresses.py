from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from corolla.cli.addresses import Address, check_addresses, parse_address
from corolla.errors import InvalidSetting

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, which hivemind uses where it is defined
    import hivemind  # noqa: F401

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def test_an_address_is_host_port_and_peer() -> None:
    text = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"
    assert parse_address(text) == Address(text, "192.0.2.7", 4001, PEER)
    assert parse_address(f"/dns4/example.org/tcp/1/p2p/{PEER}").host == "example.org"
    assert parse_address(f"/ip6/::1/tcp/1/p2p/{PEER}").host == "::1"
    assert parse_address(f"/ip6zone/eth0/ip6/fe80::1/tcp/1/p2p/{PEER}").host == "fe80::1%eth0"
    assert check_addresses(None) == []


@pytest.mark.parametrize("path", ["udp/4001/quic-v1", f"tcp/4001/p2p/{PEER}/p2p-circuit"])
def test_other_transports_and_relays_have_no_tcp_port_of_the_peer(path: str) -> None:
    assert parse_address(f"/ip6/::1/{path}/p2p/{PEER}").port is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "192.0.2.7:4001",
        "/",
        "/ip4/192.0.2.7/tcp/4001",
        "/ip4/1.2.3.400/tcp/1/p2p/" + PEER,
        "/ip4/1.2.3.4/tcp/1/p2p/abc",
        "/p2p/" + PEER,
    ],
)
def test_what_is_none_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"peers: .* is no address of a peer.*; they look like /ip4/192\.0\.2\.7/tcp/4001/p2p/"):
        check_addresses([text])


@pytest.mark.parametrize("command", ["status", "chat toy", "generate toy -p a", "serve toy", "bootstrap"])
def test_every_command_names_an_address_that_is_none(corolla: Callable[..., Any], command: str) -> None:
    result = corolla(*command.split(), "--peers", "192.0.2.7:4001")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: peers: '192.0.2.7:4001' is no address of a peer")
