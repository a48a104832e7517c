"""hivemind's node as a process of ours: it ends when it is told to, whatever state it is in."""

from __future__ import annotations

import signal

import psutil

from tests.swarm.harness import OVER_HIVEMIND

pytestmark = OVER_HIVEMIND


def test_a_node_that_hangs_is_ended_with_its_daemon() -> None:
    from corolla.swarm.dht import Node  # hivemind's import warns, which the marks allow

    node = Node(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], shutdown_timeout=0.5)
    process = psutil.Process(node.pid)
    family = [process, *process.children(recursive=True)]
    assert len(family) > 1
    process.send_signal(signal.SIGSTOP)
    node.end()
    assert not psutil.wait_procs(family[1:], timeout=10)[1]
    assert not node.is_alive()
