"""`corolla gateway` as a process of its own, over the processes of a `Swarm`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests import forked
from tests.swarm.harness import DEADLINE, Swarm


@contextmanager
def gateway_process(model: str, swarm: Swarm, folder: Path, *options: str, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """Yields the page's address. It gets the signal `end` with the block, and has `DEADLINE` seconds to follow it."""
    ready, log = folder / "gateway-ready", folder / "gateway.log"
    ready.unlink(missing_ok=True)
    command = ["gateway", model, "--peers", swarm.address, "--port", "0", "--database", str(folder / "gateway.sqlite")]
    with log.open("ab") as output:
        process = forked.start(*command, "--ready-file", str(ready), "--drain", "1", *options, output=output)
    try:
        deadline = time.monotonic() + DEADLINE
        while not ready.exists():
            assert process.poll() is None, f"the gateway ended before it was ready:\n{log.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"the gateway did not get ready:\n{log.read_text(errors='replace')}"
            time.sleep(0.05)
        yield ready.read_text().strip().rstrip("/")
    finally:
        process.send_signal(end)
        try:
            process.wait(DEADLINE)
        finally:
            with suppress(ProcessLookupError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE)
