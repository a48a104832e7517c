"""Real servers that choose their own blocks, and close a gap by themselves when one of them dies."""

from __future__ import annotations

from pathlib import Path

from corolla.models.reference import Reference
from corolla.types import GenerationSettings
from tests.models import tiny
from tests.swarm.client_process import PROMPT
from tests.swarm.harness import OVER_HIVEMIND, Client, Observer, Server, Swarm

pytestmark = OVER_HIVEMIND

LONGEST = 240.0  # seconds until the gap is closed: the dead one's record expires, the others wait, drain and load
SETTINGS = GenerationSettings(max_tokens_to_generate=20)


def serve_half(swarm: Swarm) -> Server:
    """A server that chooses two blocks of the four."""
    swarm.servers.append(swarm.run("serve", str(swarm.directory), "--peers", swarm.address, "--capacity", "2", *swarm.options))
    return swarm.servers[-1]


def test_servers_close_a_gap_by_themselves(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path / "model")
    expected = Reference(directory).greedy(PROMPT, 20)
    with Swarm(directory, tmp_path, "--dtype", "float32", "--log-level", "info") as swarm:
        for _ in range(3):
            serve_half(swarm).wait_ready()
        with Observer(swarm) as observer, Client(swarm) as client:
            spans = {record.peer: record.span for record in observer.records()}
            assert len(set(spans.values())) == 2
            assert sum(len(span) for span in set(spans.values())) == 4
            alone = next(peer for peer, span in spans.items() if list(spans.values()).count(span) == 1)
            with client.chat() as chat:
                assert chat.answer(PROMPT, SETTINGS).tokens == expected
            swarm.of(alone).kill()
            with client.chat(patience=LONGEST) as chat:
                assert chat.answer(PROMPT, SETTINGS).tokens == expected
            moved = {record.peer: record.span for record in observer.records() if record.peer != alone and record.state == "ready"}
            assert sorted(moved.values()) == sorted(set(spans.values()))
