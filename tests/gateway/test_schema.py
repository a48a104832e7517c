"""Whatever is sent to any route of /openapi.json: no fault of the gateway, and no status that is not documented."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.openapi.checks import status_code_conformance

from corolla.gateway.admission import AdmissionConfig
from corolla.gateway.service import GatewayConfig
from tests.gateway.running import Running, TinySwarm, running


@pytest.fixture(scope="module")
def fuzzed(swarm: TinySwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = GatewayConfig(admission=AdmissionConfig(streams=8, waiting=8), drain=0.1, first_token=0.1)
    with running(swarm, tmp_path_factory.mktemp("fuzzed") / "g.sqlite", config) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def whole(fuzzed: Running) -> schemathesis.BaseSchema:
    found = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    return found.exclude(path_regex="/events$")  # these never end


schema = schemathesis.pytest.from_fixture("whole")


@schema.parametrize()
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_route(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error, status_code_conformance], timeout=60)
