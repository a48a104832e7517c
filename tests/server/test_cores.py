"""The cores of a machine, shared among its servers."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest

from corolla.server.cores import SharedCores


@pytest.fixture
def prefix() -> str:
    return f"corolla-test-{uuid.uuid4().hex}-"


def another(prefix: str) -> subprocess.Popen[str]:
    """A process that shares in eight cores too, until it is killed; its line is its share."""
    code = "import sys; from corolla.server.cores import SharedCores\n"
    code += "cores = SharedCores(8, prefix=sys.argv[1]); print(cores.share, flush=True); sys.stdin.read()"
    return subprocess.Popen([sys.executable, "-c", code, prefix], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def share_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_one_server_has_all_cores(prefix: str) -> None:
    with SharedCores(8, prefix=prefix) as cores:
        assert cores.share == 8


def test_servers_share_evenly_and_one_that_ended_counts_no_more(prefix: str) -> None:
    with SharedCores(8, prefix=prefix) as cores:
        with another(prefix) as second:
            assert share_of(second) == 4
            assert cores.share == 4
            with another(prefix) as third:
                assert share_of(third) == 2  # of eight cores for three
                third.kill()
            assert cores.share == 4
            second.kill()
        assert cores.share == 8
        with SharedCores(8, prefix=prefix):
            assert cores.share == 4
        assert cores.share == 8


def test_who_was_told_how_many_keeps_them_and_counts(prefix: str) -> None:
    with SharedCores(8, 6, prefix) as told, SharedCores(8, prefix=prefix) as cores:
        assert (told.share, cores.share) == (6, 4)


def test_each_has_at_least_one(prefix: str) -> None:
    with SharedCores(2, prefix=prefix) as first, SharedCores(2, prefix=prefix), SharedCores(2, prefix=prefix):
        assert first.share == 1
