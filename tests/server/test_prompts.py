"""Soft prompts at several servers over the network of one process: sent once, asked for again, and alive after a server's death."""

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
from tests.server.ring import PROMPT, TIMEOUT, Swarm

P = 6
SETTINGS = GenerationSettings(max_tokens_to_generate=24, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def swarm(directory: Path) -> Iterator[Swarm]:
    swarm = Swarm(directory)
    for name, start, end in (("a", 0, 2), ("b", 2, 3), ("c", 3, 4)):
        swarm.add(name, start, end)
    yield swarm
    swarm.close()


def soft(*, deep: bool) -> SoftPrompt:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(4, P, 64, generator=generator) * 0.3 if deep else None
    return SoftPrompt(torch.randn(P, 64, generator=generator) * 0.3, rows)


@pytest.fixture(scope="module", params=[False, True], ids=["ptune", "deep"])
def tuned(request: pytest.FixtureRequest, directory: Path) -> tuple[SoftPrompt, list[int]]:
    """A prompt, and what one engine with the whole model answers with it."""
    prompt, transport = soft(deep=request.param), LocalTransport()
    engine = Engine(load_span(directory, dtype="float32"), EngineConfig(cache_tokens=512))
    transport.listen("engine", engine.receive)
    engine.start()
    with Session(transport, "engine", prompt) as session:
        expected = [token.token_id for token in session.generate(PROMPT, SETTINGS)]
    engine.stop()
    return prompt, expected


def kept(swarm: Swarm) -> list[int]:
    return [len(engine.prompts) for engine in swarm.engines.values()]


def test_servers_answer_with_a_prompt_as_one_engine_does(swarm: Swarm, tuned: tuple[SoftPrompt, list[int]]) -> None:
    prompt, expected = tuned
    for _ in range(2):
        with Session(swarm.transport, "", prompt) as session:
            assert [token.token_id for token in session.generate(PROMPT, SETTINGS, timeout=TIMEOUT)] == expected
        assert kept(swarm) == ([1, 1, 1] if prompt.deep is not None else [1, 0, 0])
    assert sum(server.counters.refused for server in swarm.servers.values()) == 1 if prompt.deep is None else True


@pytest.mark.parametrize("victim", ["a", "c"])
def test_an_answer_goes_on_token_for_token_when_a_server_dies(swarm: Swarm, tuned: tuple[SoftPrompt, list[int]], victim: str) -> None:
    prompt, expected = tuned
    start, end = swarm.records[victim].start, swarm.records[victim].end
    with Session(swarm.transport, "", prompt) as session:
        tokens = []
        for token in session.generate(PROMPT, SETTINGS, timeout=TIMEOUT):
            tokens.append(token.token_id)
            if len(tokens) == 9:
                swarm.add("other", start, end, throughput=50)
                swarm.kill(victim)
    assert tokens == expected


def test_a_server_that_forgot_it_asks_for_it_again(swarm: Swarm, tuned: tuple[SoftPrompt, list[int]]) -> None:
    prompt, expected = tuned
    with Session(swarm.transport, "", prompt) as session:
        list(session.generate(PROMPT, SETTINGS, timeout=TIMEOUT))
        for engine in swarm.engines.values():
            engine.prompts.lose("client")
        session.rollback(P)
        assert [token.token_id for token in session.generate(PROMPT[1:], SETTINGS, timeout=TIMEOUT)] != expected
        session.rollback(P)
        session._cached = 0
        assert [token.token_id for token in session.generate(PROMPT, SETTINGS, timeout=TIMEOUT)] == expected


def test_a_client_that_is_gone_takes_its_prompts_along(swarm: Swarm, tuned: tuple[SoftPrompt, list[int]]) -> None:
    prompt, _ = tuned
    with Session(swarm.transport, "", prompt) as session:
        list(session.generate(PROMPT, SETTINGS, timeout=TIMEOUT))
    for server in swarm.servers.values():
        server._lose("client")
    assert sum(kept(swarm)) == 0
