"""`corolla gateway` as a process of its own, over the processes of a `Swarm`."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.swarm.harness import COROLLA, DEADLINE, Swarm


@contextmanager
def gateway_process(model: str, swarm: Swarm, folder: Path, *options: str) -> Iterator[str]:
    """Yields the page's address. It is told to end with the block, and has `DEADLINE` seconds for that."""
    ready, log = folder / "gateway-ready", folder / "gateway.log"
    ready.unlink(missing_ok=True)
    command = [*COROLLA, "gateway", model, "--peers", swarm.address, "--port", "0", "--database", str(folder / "gateway.sqlite")]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--ready-file", str(ready), "--drain", "1", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + DEADLINE
        while not ready.exists():
            assert process.poll() is None, f"the gateway ended before it was ready:\n{log.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"the gateway did not get ready:\n{log.read_text(errors='replace')}"
            time.sleep(0.05)
        yield ready.read_text().strip().rstrip("/")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(DEADLINE)
        finally:
            process.kill()
            process.wait()
