"""LoRA adapters over real servers: held by name and given, kept when a server is killed, chosen on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy

from corolla.client.tokenizer import TextTokenizer
from corolla.models.adapters import load_adapter
from corolla.models.checkpoint import read_config
from corolla.models.families import architecture
from corolla.types import GenerationSettings
from tests import forked
from tests.models import lora, tiny
from tests.swarm.harness import DEADLINE, OVER_HIVEMIND, Client, Swarm

pytestmark = OVER_HIVEMIND
TEXT = [3 + i * 7 % 180 for i in range(60)]
SETTINGS = GenerationSettings(max_tokens_to_generate=60)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = toy.make_directory(tmp_path_factory.mktemp("model"), toy.byte_level())
    return tiny.save("bloom", directory, vocab_size=400)


@pytest.fixture(scope="module")
def saved(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [lora.save(directory, tmp_path_factory.mktemp("adapter"), seed=seed) for seed in range(2)]


@pytest.fixture
def swarm(directory: Path, saved: list[Path], tmp_path: Path) -> Iterator[Swarm]:
    options = ("--dtype", "float32", "--adapters", f"poet={saved[0]}", "--allow-adapters")
    with Swarm(directory, tmp_path, *options) as swarm:
        yield swarm


def test_adapters_that_are_held_and_given_survive_a_server(swarm: Swarm, directory: Path, saved: list[Path]) -> None:
    arch = architecture(read_config(directory))
    held, given = (load_adapter(path, arch) for path in saved)
    first, second, spare = swarm.serve("0:2", "2:4", "2:4")
    swarm.wait_ready()
    assert f"adapter poet {held.digest[:12]}" in first.said
    with Client(swarm) as client:
        client.wait_until_known(first, second, spare)
        for chosen, path in ((held.digest, saved[0]), (given, saved[1])):
            expected = lora.Adapted(directory, path).greedy(TEXT, 60)
            with client.chat(adapter=chosen) as chat:
                kill = {10: lambda chat=chat: swarm.of(chat.route[1]).kill()} if chosen is given else {}
                assert chat.answer(TEXT, SETTINGS, at=kill).tokens == expected
        assert client.transport.counters.faults >= 1
    options = [str(directory), "--peers", swarm.address, "--prompt", "hello", "--json", "--max-new-tokens", "8"]
    tokens = TextTokenizer(directory).encode("hello", opening=True)
    for name, reference in (("poet", saved[0]), (str(saved[1]), saved[1])):
        done = forked.run("generate", *options, "--adapter", name, timeout=DEADLINE)
        answer = json.loads(done.stdout)["token_ids"]
        assert answer == lora.Adapted(directory, reference).greedy(tokens, len(answer)), done.stderr
    done = forked.run("generate", *options, "--adapter", "cook", timeout=DEADLINE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "they have: poet" in done.stderr
