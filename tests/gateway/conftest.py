"""One swarm of tiny models and one open gateway over it, for all tests of a module that harm neither."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.gateway.running import Running, TinySwarm, make_model, running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def swarm(tiny_model: Path) -> Iterator[TinySwarm]:
    swarm = TinySwarm(tiny_model)
    yield swarm
    swarm.close()


@pytest.fixture(scope="module")
def gateway(swarm: TinySwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(swarm, tmp_path_factory.mktemp("gateway") / "gateway.sqlite") as gateway:
        yield gateway


@pytest.fixture
def client(gateway: Running) -> Iterator[httpx2.Client]:
    with gateway.client() as client:
        yield client
