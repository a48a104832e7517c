from __future__ import annotations

from corolla.cli.hops import Hops
from corolla.messages import HopTiming


def test_means_over_tokens_in_milliseconds_in_the_order_of_the_route() -> None:
    hops = Hops()
    hops.add([HopTiming("b", 0.001, 0.010, 0.0002), HopTiming("a", 0.0, 0.020, 0.05)])
    hops.add([HopTiming("b", 0.003, 0.020, 0.0004), HopTiming("c", 0.0, 0.030, 0.0)])
    assert hops.means() == [
        {"peer": "b", "steps": 2, "queue_ms": 2.0, "compute_ms": 15.0, "transfer_ms": 0.3},
        {"peer": "a", "steps": 1, "queue_ms": 0.0, "compute_ms": 20.0, "transfer_ms": 50.0},
        {"peer": "c", "steps": 1, "queue_ms": 0.0, "compute_ms": 30.0, "transfer_ms": 0.0},
    ]


def test_nothing_added_is_an_empty_list() -> None:
    assert Hops().means() == []
