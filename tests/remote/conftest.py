"""Tiny checkpoints and swarms for the PyTorch client's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny
from tests.remote.swarm import Local

MakeSwarm = Callable[..., Local]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny.save(family, tmp_path_factory.mktemp(family)) for family in ("llama", "bloom")}


@pytest.fixture(params=["llama", "bloom"])
def directory(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


@pytest.fixture
def make_swarm() -> Iterator[MakeSwarm]:
    """`Local` of the given servers, closed when the test ends."""
    made: list[Local] = []

    def make(directory: Path, servers: dict[str, tuple[int, int]], **config: Any) -> Local:
        made.append(Local(directory, servers, **config))
        return made[-1]

    yield make
    for local in made:
        local.close()
