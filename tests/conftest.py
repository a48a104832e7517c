"""Fixtures that every room's tests may ask for."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# What `make check` leaves out, by the beginning of a test's id: whatever starts processes, and trainings.
LONG = (
    "browser/",
    "cli/test_batch.py::test_a_job_that_was_killed",
    "cli/test_chat.py::test_the_default_model",
    "cli/test_logs.py::test_hiveminds",
    "cli/test_main.py::test_help_imports",
    "cli/test_prepare.py::test_help_imports",
    "cli/test_reach.py::test_a_clock",
    "cli/test_reach.py::test_a_real_swarm",
    "cli/test_serve.py::test_a_server_that",
    "cli/test_tune.py::test_it_is_interrupted",
    "cli/test_up.py",
    "data/test_prepare_processes.py",
    "examples/",
    "gateway/",
    "models/test_smollm2.py::test_convert",
    "models/test_smollm2.py::test_fetch_without",
    "models/test_smollm2.py::test_importing",
    "models/test_span.py::test_a_span_takes_memory",
    "models/test_span.py::test_bloom_at_the_shape",
    "remote/test_models.py::test_importing",
    "remote/test_swarm.py",
    "server/test_cores.py::test_servers_share",
    "swarm/test_adapters.py",
    "swarm/test_bounds.py",
    "swarm/test_chaos.py",
    "swarm/test_churn.py",
    "swarm/test_crowd.py",
    "swarm/test_dht.py",
    "swarm/test_directory.py",
    "swarm/test_faults.py",
    "swarm/test_fuzz.py",
    "swarm/test_hostile_p2p.py",
    "swarm/test_invariance.py",
    "swarm/test_membership.py",
    "swarm/test_p2p.py",
    "swarm/test_processes.py",
    "swarm/test_prompts.py",
    "swarm/test_quantized.py",
    "swarm/test_reachability.py",
    "swarm/test_rebalancing.py",
    "tuning/",
)

# Before torch is imported, here and in the processes that tests start. Tiny models gain nothing from threads, and where a
# machine's cores are shared every operation waits for the slowest of them: tests/engine took minutes instead of seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has them ignore interrupts, and all processes below them; some tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that a failure is a change's; `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A worker that takes a file of minutes when all others are done keeps the rest of the machine waiting.
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/browser/", "tests/cli/", "tests/swarm/", "tests/tuning/")))
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(LONG):
            item.add_marker("long")


@pytest.fixture(autouse=True)
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test marked `alone` waits until the other workers' tests have ended, and they wait for it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent  # of all workers of this run
    how = fcntl.LOCK_SH if request.node.get_closest_marker("alone") is None else fcntl.LOCK_EX
    with (shared / "door").open("w") as door, (shared / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)  # who waits for the room stands in the door, so that nobody overtakes
        fcntl.flock(room, how)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
        fcntl.flock(room, fcntl.LOCK_UN)  # said, for a process that was forked meanwhile keeps what only closing would give back


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the default model: fetched and converted once, then found in the user's cache."""
    from corolla.models.catalog import resolve

    return Path(resolve("smollm2"))


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, or of the size that a test gives it (indirectly) in the words of `mount`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '1m')}", "tmpfs", disk]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True, timeout=60)
    if not mounted or mounted.returncode != 0:
        message = "mounting a small disk takes root"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True, timeout=60)  # weights that were read may still be mapped
