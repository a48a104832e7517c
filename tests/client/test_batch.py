"""Batches over an engine with a tiny model, and over a server that fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import toy
from fakes import FakeEngine

from corolla.client.batch import Batch, BatchConfig
from corolla.client.batch_requests import BatchRequest
from corolla.client.tokenizer import TextTokenizer
from corolla.engine.engine import Engine, EngineConfig
from corolla.errors import DataError, InvalidSetting, ServerFault, StorageError
from corolla.models.span import load_span
from corolla.swarm.local import LocalTransport
from corolla.types import GenerationSettings
from tests.models import tiny

TIMEOUT = 120.0  # seconds for a token


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(toy.make_directory(tmp_path_factory.mktemp("toy"), toy.byte_level()))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tiny.save("llama", tmp_path_factory.mktemp("llama"), vocab_size=400)
    engine = Engine(load_span(directory, dtype="float32"), EngineConfig(cache_tokens=1024, page_size=16))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    engine = FakeEngine(lambda history: iter([5, 6, toy.END]))
    yield engine
    engine.stop()


def requests(count: int) -> list[BatchRequest]:
    return [BatchRequest(index, str(index), prompt=str(index), logprobs=index % 2 == 0) for index in range(count)]


def prepare(request: BatchRequest) -> tuple[list[int], GenerationSettings]:
    draw = random.Random(request.index)
    tokens = [draw.randrange(3, 400) for _ in range(draw.randrange(1, 40))]
    return tokens, GenerationSettings(max_tokens_to_generate=1 + request.index % 9, stop_token_ids=(toy.END,), top_logprobs=1)


def run(
    transport: LocalTransport, peer: str, tokenizer: TextTokenizer, asked: list[BatchRequest], **config: Any
) -> dict[int, dict[str, Any]]:
    written: dict[int, dict[str, Any]] = {}
    counts = Batch(transport, peer, tokenizer, prepare, written.__setitem__, BatchConfig(timeout=TIMEOUT, **config)).run(iter(asked))
    assert counts.requests == len(written)
    return written


def over(engine: Engine) -> LocalTransport:
    transport = LocalTransport()
    transport.listen("engine", engine.receive)
    return transport


def test_answers_do_not_depend_on_how_many_are_asked_at_once(engine: Engine, tokenizer: TextTokenizer) -> None:
    one, many, crowded = (
        run(over(engine), "engine", tokenizer, requests(40), **config)
        for config in ({"concurrency": 1}, {"concurrency": 32, "cache_tokens": 1024}, {"concurrency": 32})
    )
    assert sorted(one) == list(range(40))
    for other in (many, crowded):
        assert [other[i]["text"] for i in range(40)] == [one[i]["text"] for i in range(40)]
    assert [len(one[i]["logprobs"]) for i in (0, 2)] == [one[i]["completion_tokens"] for i in (0, 2)]
    assert "logprobs" not in one[1]
    assert {"token", "token_id", "logprob", "top_logprobs"} == one[2]["logprobs"][0].keys()


def test_ten_thousand_short_requests_are_all_answered_once(fake: FakeEngine, tokenizer: TextTokenizer) -> None:
    seen: list[int] = []
    Batch(fake.transport, "fake", tokenizer, prepare, lambda index, _: seen.append(index), BatchConfig(timeout=TIMEOUT)).run(
        iter(requests(10_000))
    )
    assert sorted(seen) == list(range(10_000))


def test_a_bad_request_has_its_error_and_the_rest_an_answer(fake: FakeEngine, tokenizer: TextTokenizer) -> None:
    asked = requests(3)
    asked[1] = BatchRequest(1, "bad", error=DataError("line 2: it is no JSON"), metadata="kept")
    written = run(fake.transport, "fake", tokenizer, asked)
    assert written[1] == {"id": "bad", "metadata": "kept", "error": {"type": "DataError", "message": "line 2: it is no JSON"}}
    assert written[2]["finish_reason"] == "stop"


def test_a_servers_fault_is_asked_again_and_marked_if_it_stays(fake: FakeEngine, tokenizer: TextTokenizer) -> None:
    fake.fail = [ServerFault("broken")]
    assert "text" in run(fake.transport, "fake", tokenizer, requests(1), attempts=2)[0]
    fake.fail = [ServerFault("broken")] * 2
    failed = run(fake.transport, "fake", tokenizer, requests(1), attempts=2)[0]
    assert (failed["error"]["type"], failed["retry"]) == ("ServerFault", True)


def test_what_nobody_expected_fails_one_request(fake: FakeEngine, tokenizer: TextTokenizer) -> None:
    def fragile(request: BatchRequest) -> tuple[list[int], GenerationSettings]:
        if request.index == 1:
            raise KeyError("odd")
        return prepare(request)

    written: dict[int, dict[str, Any]] = {}
    Batch(fake.transport, "fake", tokenizer, fragile, written.__setitem__, BatchConfig(timeout=TIMEOUT)).run(iter(requests(3)))
    assert written[1] == {"id": "1", "error": {"type": "KeyError", "message": "'odd'"}, "retry": True}
    assert "text" in written[2]


def test_a_full_disk_ends_the_run(fake: FakeEngine, tokenizer: TextTokenizer) -> None:
    def write(index: int, result: dict[str, Any]) -> None:
        raise StorageError("full")

    with pytest.raises(StorageError, match="full"):
        Batch(fake.transport, "fake", tokenizer, prepare, write, BatchConfig(timeout=TIMEOUT)).run(iter(requests(10)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("corolla-batch")]


def test_more_at_once_than_an_engine_takes_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="concurrency"):
        BatchConfig(concurrency=300)
