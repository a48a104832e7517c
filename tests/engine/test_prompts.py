"""Soft prompts in an engine: greedy tokens are those of PEFT in one process, and of deep prompts those of the stock model's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from corolla.client.session import Session
from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.prompts import OVERHEAD, PromptLimits, PromptStore
from corolla.errors import InvalidSetting, PromptNeeded
from corolla.models.prompts import SoftPrompt
from corolla.models.span import SpanModel, load_span
from corolla.swarm.local import LocalTransport
from corolla.types import GenerationSettings, PromptName, PromptPart, Span, Step
from tests.models import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers by its old name
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),  # PEFT, of those that generate makes itself
]
P = 5
TEXTS = [[3 + i * 7 % 180 for i in range(length)] for length in (23, 50)]
GREEDY = GenerationSettings(max_tokens_to_generate=20)
PENALIZED = GenerationSettings(max_tokens_to_generate=20, repetition_penalty=1.7)


@pytest.fixture(scope="module", params=["bloom", "llama"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(directory: Path) -> SpanModel:
    return load_span(directory, dtype="float32")


def soft(model: SpanModel, *, deep: bool = False, seed: int = 0) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    width, blocks = model.arch.hidden, model.arch.blocks
    rows = torch.randn(blocks, P, width, generator=generator) * 0.3 if deep else None
    return SoftPrompt(torch.randn(P, width, generator=generator) * 0.3, rows)


def stock(directory: Path, prompt: SoftPrompt, text: list[int], **settings: Any) -> list[int]:
    """Greedy tokens of transformers' model; the prompt's rows in front of the embeddings, as PEFT puts them, and added at each block."""
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    base = reference.base_model
    tokens = list(text)

    def adding(rows: torch.Tensor) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args[0] + torch.nn.functional.pad(rows, (0, 0, 0, args[0].shape[1] - P)), *args[1:]

        return hook

    if prompt.deep is not None:
        for block, rows in zip(base.layers if hasattr(base, "layers") else base.h, prompt.deep, strict=True):
            block.register_forward_pre_hook(adding(rows))
    embeddings = reference.get_input_embeddings()
    for _ in range(20):
        with torch.inference_mode():
            rows = torch.cat([prompt.input, embeddings(torch.tensor(tokens))])
            tokens.append(int(reference(inputs_embeds=rows[None], use_cache=False).logits[0, -1].argmax()))
    return tokens[len(text) :]


@contextmanager
def running(model: SpanModel, **config: Any) -> Iterator[tuple[LocalTransport, Engine]]:
    engine, transport = Engine(model, EngineConfig(**{"cache_tokens": 1024, "page_size": 16, "step_rows": 32, **config})), LocalTransport()
    transport.listen("engine", engine.receive)
    engine.start()
    try:
        yield transport, engine
    finally:
        engine.stop()
        engine.check_integrity()


def answer(session: Session, text: list[int], settings: GenerationSettings = GREEDY) -> list[int]:
    return [token.token_id for token in session.generate(text, settings)]


def test_tokens_are_those_of_peft(directory: Path, model: SpanModel) -> None:
    from peft import PromptTuningConfig, get_peft_model

    prompt = soft(model)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    tuned = get_peft_model(reference, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    tuned.prompt_encoder["default"].embedding.weight.data.copy_(prompt.input)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for text, settings, more in zip(TEXTS, (GREEDY, PENALIZED), ({}, {"repetition_penalty": 1.7}), strict=True):
        inputs = torch.tensor([text])
        expected = tuned.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options, **more)[0, len(text) :].tolist()
        with running(model) as (transport, _), Session(transport, "engine", prompt) as session:
            assert answer(session, text, settings) == expected


def test_deep_prompts_are_added_at_every_block(directory: Path, model: SpanModel) -> None:
    prompt = soft(model, deep=True)
    with running(model) as (transport, _), Session(transport, "engine", prompt) as session:
        assert answer(session, TEXTS[1]) == stock(directory, prompt, TEXTS[1])


def test_sessions_of_different_prompts_share_a_step_and_no_pages(directory: Path, model: SpanModel) -> None:
    prompts = [soft(model, seed=1), soft(model, deep=True, seed=2), soft(model, seed=3)]
    expected = [stock(directory, prompt, TEXTS[1]) for prompt in prompts]
    with running(model) as (transport, engine):
        sessions = [Session(transport, "engine", prompt) for prompt in prompts]
        answers = [session.generate(TEXTS[1], GREEDY) for session in sessions]
        got = [[token.token_id for token in together] for together in zip(*answers, strict=True)]
        assert got == [list(together) for together in zip(*expected, strict=True)]
        assert engine.counters.reused == 0
        with Session(transport, "engine", prompts[0]) as again:
            assert answer(again, TEXTS[1]) == expected[0]
        assert engine.counters.reused > 0


def test_a_forgotten_prompt_is_sent_again_by_itself(directory: Path, model: SpanModel) -> None:
    prompt = soft(model, deep=True)
    with running(model) as (transport, engine), Session(transport, "engine", prompt) as session:
        expected = answer(session, TEXTS[0])
        engine.prompts.lose("")
        session.rollback(P + 3)  # within the positions behind it the prompt is not needed
        assert answer(session, TEXTS[0][3:]) == expected
        engine.prompts.lose("")
        session._cached = 0  # as after an eviction
        session.rollback(P)
        assert answer(session, TEXTS[0]) == expected


def part(model: SpanModel, name: str = "a", tokens: int = P, **changes: Any) -> PromptPart:
    rows = torch.zeros(tokens, model.arch.hidden)
    return PromptPart(**{"name": PromptName(name, tokens, deep=False), "span": Span(0, 4), "input": rows, **changes})


def test_what_does_not_fit_is_refused(model: SpanModel) -> None:
    store = PromptStore(model, PromptLimits(tokens=8, size=10**4, size_per_client=4 * 10**3 + OVERHEAD))
    for bad in (
        part(model, input=torch.full((P, model.arch.hidden), float("nan"))),
        part(model, input=torch.zeros(P, 7)),
        part(model, input=torch.zeros(P + 1, model.arch.hidden)),
        part(model, deep=torch.zeros(4, P, model.arch.hidden)),
        part(model, span=Span(0, 5)),
        part(model, tokens=9),
        part(model, name="a", tokens=8, deep=torch.zeros(4, 8, model.arch.hidden)),
        PromptPart(PromptName("deep", 8, deep=True), Span(0, 4), None, torch.zeros(4, 8, model.arch.hidden)),  # too many bytes
    ):
        with pytest.raises(InvalidSetting):
            store.put("client", bad)
    assert len(store) == 0


def test_the_longest_unused_goes_first_and_a_client_takes_none_of_anothers_share(model: SpanModel) -> None:
    size = P * model.arch.hidden * 4 + OVERHEAD
    store = PromptStore(model, PromptLimits(size=4 * size, size_per_client=2 * size))
    store.put("other", part(model, "a"))
    for name in ("a", "b"):
        store.put("client", part(model, name))
    assert store.find("client", PromptName("a", P, deep=False), Span(0, 4), with_input=True) is not None
    store.put("client", part(model, "c"))
    kept = [store.find("client", PromptName(name, P, deep=False), Span(0, 4), with_input=True) is not None for name in "abc"]
    assert kept == [True, False, True]
    assert store.find("other", PromptName("a", P, deep=False), Span(0, 4), with_input=True) is not None
    store.lose("client")
    assert len(store) == 1


def test_a_step_that_names_an_unknown_prompt_is_told(model: SpanModel) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=256))
    step = Step("s", 0, (0,) * P + (5, 6), prompt=PromptName("unknown", P, deep=False))
    with pytest.raises(PromptNeeded):
        engine.receive(step, lambda reply: None)
