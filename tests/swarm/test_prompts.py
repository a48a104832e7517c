"""A soft prompt over real servers: an answer goes on token for token when one of them is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from corolla.client.session import Session
from corolla.engine.engine import Engine, EngineConfig
from corolla.models.prompts import SoftPrompt
from corolla.models.span import load_span
from corolla.swarm.local import LocalTransport
from corolla.types import GenerationSettings
from tests.models import tiny
from tests.swarm.harness import OVER_HIVEMIND, PATIENCE, Client, Swarm

pytestmark = OVER_HIVEMIND
TEXT = [3 + i * 7 % 180 for i in range(60)]
SETTINGS = GenerationSettings(max_tokens_to_generate=200)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("bloom", tmp_path_factory.mktemp("model"))


@pytest.fixture
def swarm(directory: Path, tmp_path: Path) -> Iterator[Swarm]:
    with Swarm(directory, tmp_path, "--dtype", "float32") as swarm:
        yield swarm


def undisturbed(directory: Path, prompt: SoftPrompt) -> list[int]:
    """What one engine with all blocks answers."""
    engine, transport = Engine(load_span(directory, dtype="float32"), EngineConfig(cache_tokens=1024)), LocalTransport()
    transport.listen("engine", engine.receive)
    engine.start()
    try:
        with Session(transport, "engine", prompt) as session:
            return [token.token_id for token in session.generate(TEXT, SETTINGS, timeout=PATIENCE)]
    finally:
        engine.stop()


def test_an_answer_with_a_prompt_survives_a_server(swarm: Swarm, directory: Path) -> None:
    torch.manual_seed(0)
    prompt = SoftPrompt(torch.randn(7, 64) * 0.3, torch.randn(4, 7, 64) * 0.3)
    first, second, spare = swarm.serve("0:2", "2:4", "2:4")
    swarm.wait_ready()
    with Client(swarm) as client:
        client.wait_until_known(first, second, spare)
        with client.chat(prompt=prompt) as chat:
            answer = chat.answer(TEXT, SETTINGS, at={10: lambda: swarm.of(chat.route[1]).kill()})
        assert client.transport.counters.faults >= 1
    assert answer.tokens == undisturbed(directory, prompt)
