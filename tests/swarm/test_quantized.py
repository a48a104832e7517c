"""A quantized model over real servers: the tokens of one process, whether it was quantized before or while loading."""

from __future__ import annotations

from pathlib import Path

import pytest

from corolla.errors import NoRoute
from corolla.models.quantization import quantize_model
from corolla.models.quantized_tensor import QuantizedFormat
from corolla.types import GenerationSettings
from tests.engine.driving import Chain, greedy
from tests.models import tiny
from tests.swarm.harness import OVER_HIVEMIND, Client, Swarm

pytestmark = OVER_HIVEMIND
PROMPT = [3 + i * 7 % 180 for i in range(40)]
COUNT = 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("bloom", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_two_servers_of_a_quantized_model_answer_as_one_process(format: QuantizedFormat, directory: Path, tmp_path: Path) -> None:
    quantize_model(directory, tmp_path / "q", format)
    with Swarm(tmp_path / "q", tmp_path, "--dtype", "float32") as swarm:
        servers = swarm.serve("0:2", "2:4")
        swarm.wait_ready()
        assert [record["weights"] for record in swarm.status()] == [format, format]
        with Client(swarm) as client:
            client.wait_until_known(*servers)
            with client.chat() as chat:
                tokens = chat.answer(PROMPT, GenerationSettings(max_tokens_to_generate=COUNT)).tokens
    assert tokens == greedy(Chain.load(tmp_path / "q", [4], dtype="float32", weights=format), [PROMPT], COUNT)[0]


def test_servers_that_quantize_while_they_load_answer_as_one_process_and_mix_with_no_others(directory: Path, tmp_path: Path) -> None:
    with Swarm(directory, tmp_path, "--dtype", "float32") as swarm:
        (first,) = swarm.serve("0:2", options=("--quant", "nf4"))
        (other,) = swarm.serve("2:4")
        for server in (first, other):
            server.wait_ready()
        with Client(swarm) as client:
            with pytest.raises(NoRoute):
                client.transport.router.route((), 1)
            (second,) = swarm.serve("2:4", options=("--quant", "nf4"))
            client.wait_until_known(second)
            with client.chat() as chat:
                tokens = chat.answer(PROMPT, GenerationSettings(max_tokens_to_generate=COUNT)).tokens
                assert set(chat.route) == {first.peer, second.peer}
    assert tokens == greedy(Chain.load(directory, [4], dtype="float32", weights="nf4"), [PROMPT], COUNT)[0]
