"""LoRA adapters in an engine: logits and tokens are PEFT's, in batches of any adapters too, over weights of every format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.client.session import Session
from corolla.engine.adapters import OVERHEAD, AdapterLimits, AdapterStore, StoredAdapter
from corolla.engine.attention import SequenceRows
from corolla.engine.batch import ScheduledSequence
from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.kv_cache import KVCache
from corolla.engine.model_runner import ModelRunner
from corolla.engine.page_pool import PagePool
from corolla.errors import AdapterError, AdapterNeeded, InvalidSetting, NetworkError
from corolla.models.adapters import Adapter, load_adapter
from corolla.models.linear import PlainLinear, WeightFormat
from corolla.models.span import SpanModel, load_span
from corolla.types import AdapterPart, Factors, GenerationSettings, Span, Step
from tests.engine.test_prompts import GREEDY, TEXTS, answer, running, soft
from tests.models import lora, tiny

CHOSEN = ({}, {"r": 3, "target_modules": "all-linear", "use_rslora": True}, {"r": 8, "layers_to_transform": [0, 3]})


@pytest.fixture(scope="module", params=["bloom", "llama"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def saved(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of different ranks and matrices."""
    fused = (directory / "config.json").read_text().count('"bloom"') > 0
    some = {"target_modules": ["query_key_value"] if fused else ["q_proj", "v_proj", "down_proj"]}
    folder = tmp_path_factory.mktemp("adapters")
    return [lora.save(directory, folder / str(i), seed=i, **(some | options if i == 2 else options)) for i, options in enumerate(CHOSEN)]


@pytest.fixture(scope="module")
def model(directory: Path) -> SpanModel:
    return load_span(directory, dtype="float32")


@pytest.fixture(scope="module")
def adapters(model: SpanModel, saved: list[Path]) -> list[Adapter]:
    return [load_adapter(path, model.arch) for path in saved]


def kept(model: SpanModel, adapter: Adapter | None) -> StoredAdapter | None:
    if adapter is None:
        return None
    store = AdapterStore(model)
    store.hold(adapter.part(model.span))
    return store.find(adapter.digest, model.span)


def logits_of(
    model: SpanModel, sessions: Sequence[tuple[list[int], StoredAdapter | None]], *, batch_invariant: bool = False
) -> list[torch.Tensor]:
    """The logits after each session's tokens, of one forward of all of them."""
    cache = KVCache(model.arch, model.span, 64 * 16, 16, model.dtype, model.device)
    runner, pool = ModelRunner(model, cache, batch_invariant=batch_invariant), PagePool(64, 16)
    works = []
    for tokens, adapter in sessions:
        table = pool.open()
        assert pool.reserve(table, len(tokens))
        works.append(ScheduledSequence(SequenceRows(table, 0, len(tokens)), tokens, logits=1, adapter=adapter))
    logits = runner.forward(works).logits
    assert logits is not None
    return list(logits)


@pytest.mark.parametrize("weights", ["plain", "packed"])
def test_logits_are_those_of_peft(directory: Path, saved: list[Path], weights: WeightFormat) -> None:
    model = load_span(directory, dtype="float32", weights=weights)
    for path in saved:
        adapter, reference = kept(model, load_adapter(path, model.arch)), lora.Adapted(directory, path)
        for text in TEXTS:
            (logits,) = logits_of(model, [(text, adapter)])
            torch.testing.assert_close(logits, reference.logits(text)[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "falcon-7b", "falcon-40b", "gpt-neox"])
def test_other_families(tmp_path: Path, family: str) -> None:
    base = tiny.save(family, tmp_path / "base")
    path, model = lora.save(base, tmp_path / "adapter"), load_span(base, dtype="float32")
    (logits,) = logits_of(model, [(TEXTS[0], kept(model, load_adapter(path, model.arch)))])
    expected = lora.Adapted(base, path).logits(TEXTS[0])[-1]
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_each_row_of_a_mixed_batch_has_its_own_adapters_numbers(model: SpanModel, adapters: list[Adapter]) -> None:
    sessions = [(TEXTS[0][i:], kept(model, a)) for i, a in enumerate([adapters[0], None, adapters[1], adapters[2], None, adapters[0]])]
    for together, one in zip(logits_of(model, sessions), sessions, strict=True):
        torch.testing.assert_close(together, logits_of(model, [one])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_fixed_shapes_a_mixed_batch_has_the_same_bits(directory: Path, adapters: list[Adapter], dtype: str) -> None:
    model = load_span(directory, dtype=dtype)
    sessions = [(TEXTS[0][i : i + 3], kept(model, a)) for i, a in enumerate([adapters[0], None, adapters[1], adapters[2], None])]
    alone = [logits_of(model, [one], batch_invariant=True)[0] for one in sessions]
    assert all(map(torch.equal, logits_of(model, sessions, batch_invariant=True), alone))
    assert all(map(torch.equal, logits_of(model, sessions[::-1], batch_invariant=True), alone[::-1]))


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
def test_over_quantized_weights_they_add_the_same(directory: Path, adapters: list[Adapter], weights: WeightFormat) -> None:
    model = load_span(directory, dtype="float32", weights=weights)
    wide = load_span(directory, dtype="float32", weights=weights)
    wide.blocks = tuple(
        replace(block, **{n: PlainLinear(getattr(block, n).widened(), _bias(block, n)) for n in model.arch.products})
        for block in wide.blocks
    )
    (logits,), (expected,) = (logits_of(m, [(TEXTS[0], kept(m, adapters[0]))]) for m in (model, wide))
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def _bias(block: Any, product: str) -> torch.Tensor | None:
    """What the product makes of zeros."""
    linear = getattr(block, product)
    return linear(torch.zeros(1, linear.widened().shape[1]))[0].clone()


def test_sessions_of_different_adapters_share_steps_and_no_pages(
    directory: Path, saved: list[Path], model: SpanModel, adapters: list[Adapter]
) -> None:
    expected = [lora.Adapted(directory, path).greedy(TEXTS[1], 20) for path in (*saved, None)]
    with running(model) as (transport, engine):
        sessions = [Session(transport, "engine", adapter=adapter) for adapter in (*adapters, None)]
        answers = [session.generate(TEXTS[1], GREEDY) for session in sessions]
        got = [[token.token_id for token in together] for together in zip(*answers, strict=True)]
        assert [list(one) for one in zip(*got, strict=True)] == expected
        assert engine.counters.reused == 0
        with Session(transport, "engine", adapter=adapters[1].digest) as again:
            assert answer(again, TEXTS[1]) == expected[1]
        assert engine.counters.reused > 0


def test_a_session_with_a_prompt_and_an_adapter(directory: Path, saved: list[Path], model: SpanModel, adapters: list[Adapter]) -> None:
    prompt = soft(model)
    with running(model) as (transport, _), Session(transport, "engine", prompt, adapters[0]) as session:
        assert answer(session, TEXTS[0]) == lora.Adapted(directory, saved[0]).greedy(TEXTS[0], 20, prompt.input)


def part(adapter: Adapter, start: int = 0, end: int = 4, **changes: Any) -> AdapterPart:
    return replace(adapter.part(Span(start, end)), **changes)


def test_what_does_not_fit_is_refused(model: SpanModel, adapters: list[Adapter]) -> None:
    good, other = adapters[0], adapters[1]
    thin = Adapter(({"qkv": Factors(torch.zeros(2, 7), torch.zeros(model.arch.products["qkv"][0], 2))}, {}, {}, {}))
    huge = Adapter(({"qkv": Factors(*(torch.full_like(f, 1e30) for f in good.blocks[0]["qkv"]))}, {}, {}, {}))
    store = AdapterStore(load_span_like(model), AdapterLimits(size=10**6, size_per_client=10**6))
    for bad in (
        part(good, blocks=other.blocks),
        part(good, digest=other.digest),
        part(good, digests=good.digests[:3]),
        thin.part(Span(0, 4)),
        huge.part(Span(0, 4)),
        Adapter(({"gates": good.blocks[0]["qkv"]}, {}, {}, {})).part(Span(0, 1)),
        replace(good.part(Span(3, 4)), span=Span(4, 5)),
    ):
        with pytest.raises(InvalidSetting):
            store.put("client", bad)
    assert len(store) == 0


def load_span_like(model: SpanModel) -> SpanModel:
    """The same in float16, which 1e30 does not fit."""
    return SpanModel(
        model.arch, model.span, torch.float16, model.device, model.weights, model.blocks, None, None, None, None, model.bytes_read
    )


def test_the_longest_unused_of_clients_goes_first_and_what_is_held_stays(model: SpanModel, adapters: list[Adapter]) -> None:
    small = [Adapter(tuple({"out": Factors(f.a * scale, f.b)} for f in (b["out"] for b in adapters[0].blocks))) for scale in (1, 2, 3, 4)]
    size = sum(factor.nbytes for block in small[0].blocks for factor in block["out"]) + 5 * OVERHEAD
    store = AdapterStore(model, AdapterLimits(size=2 * size, size_per_client=2 * size))
    store.hold(part(small[0]))
    for adapter in small[1:3]:
        store.put("client", part(adapter, 0, 2))
        assert store.find(adapter.digest, model.span) is None
        store.put("client", part(adapter, 2, 4))
    assert store.find(small[1].digest, model.span) is not None
    store.put("other", part(small[3]))
    assert [store.find(adapter.digest, Span(1, 3)) is not None for adapter in small] == [True, True, False, True]


def test_one_that_is_too_large_is_said_to_be(model: SpanModel, adapters: list[Adapter]) -> None:
    store = AdapterStore(model, AdapterLimits(size=10**6, size_per_client=1000))
    with pytest.raises(InvalidSetting, match="1000 bytes"):
        store.put("client", part(adapters[0]))
    step = Step("s", 0, (1,), adapter=adapters[0].digest, client="client")
    with pytest.raises(InvalidSetting, match="1000 bytes"):
        store.check(step, model.span)
    with pytest.raises(AdapterNeeded):
        store.check(replace(step, client="another"), model.span)


def test_a_step_with_an_unknown_adapter_is_told(model: SpanModel) -> None:
    for takes, error in ((True, AdapterNeeded), (False, NetworkError)):
        engine = Engine(model, EngineConfig(cache_tokens=256, take_adapters=takes))
        with pytest.raises(error):
            engine.receive(Step("s", 0, (5, 6), adapter="0" * 64), lambda reply: None)


def test_a_session_that_cannot_give_its_adapter_says_so(model: SpanModel, adapters: list[Adapter]) -> None:
    with running(model) as (transport, _), Session(transport, "engine", adapter="0" * 64) as session:
        with pytest.raises(AdapterError, match="name its directory"):
            answer(session, TEXTS[0])
        assert session.tokens == []


def test_one_that_was_forgotten_during_an_answer_is_given_again(model: SpanModel, adapters: list[Adapter]) -> None:
    settings = GenerationSettings(max_tokens_to_generate=30)
    with running(model) as (transport, engine), Session(transport, "engine", adapter=adapters[0]) as session:
        expected = answer(session, TEXTS[0], settings)
        engine.adapters.hold(adapters[0].part(model.span))
        session.rollback(0)
        numbers = count()
        tokens = []
        for token in session.generate(TEXTS[0], settings):
            tokens.append(token.token_id)
            if next(numbers) == 9:
                engine.adapters._kept.clear()
        assert tokens == expected
