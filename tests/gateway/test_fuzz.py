"""A short run of `fuzz_requests`; `make fuzz` has the long one."""

from __future__ import annotations

from tests.gateway.fuzz_requests import fuzz
from tests.gateway.running import Running


def test_odd_requests_are_answered(gateway: Running) -> None:
    statuses = fuzz(gateway, 400, seed=1, every=200)
    assert statuses[200] > 20
    assert statuses[422] > 20
    assert statuses[400] > 20
