"""Whatever is sent to any route of /openapi.json: no fault of the gateway, and no status that is not documented."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from corolla.gateway.fair_queue import QueueConfig
from corolla.gateway.service import GatewayConfig
from tests.gateway.running import Running, TinySwarm, running


@pytest.fixture(scope="module")
def fuzzed(swarm: TinySwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = GatewayConfig(queue=QueueConfig(streams=8, waiting=8), drain=0.1, first_token=0.1)
    with running(swarm, tmp_path_factory.mktemp("fuzzed") / "g.sqlite", config) as gateway:
        yield gateway


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_route(fuzzed: Running, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [found.ok() for found in schema.exclude(path_regex="/events$").get_all_operations()]  # those never end
    assert len(operations) > 20
    for operation in operations:

        @settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=[not_a_server_error, status_code_conformance], timeout=60)

        with suppress(Unsatisfiable):  # a route may take anything, and then nothing is wrong for it
            check()
