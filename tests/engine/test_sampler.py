import math
import random
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from corolla.engine import sampler
from corolla.engine.sampler import SampleRequest, processed_logits, sample, uniform
from corolla.errors import InvalidSetting
from corolla.types import GenerationSettings


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def request(*, position: int = 0, history: list[int] | None = None, **settings: object) -> SampleRequest:
    return SampleRequest(GenerationSettings(**settings), position, history or [])


def random_case(rng: random.Random) -> tuple[torch.Tensor, SampleRequest]:
    """Logits and a sampling request; half of the logits are in bfloat16 steps, with many ties."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    vocabulary = rng.choice([2, 7, 100, 3000])
    logits = torch.randn(vocabulary, generator=generator) * rng.choice([0.0, 0.5, 3.0, 10.0])
    if rng.random() < 0.5:
        logits = logits.bfloat16()
    return logits, request(
        do_sample=True,
        position=rng.randrange(10_000),
        seed=rng.randrange(2**63),
        history=[rng.randrange(vocabulary) for _ in range(rng.randrange(20))],
        temperature=rng.choice([1.0, 0.7, 0.05, rng.uniform(0.01, 1)]),
        top_k=rng.choice([None, 1, vocabulary, rng.randint(1, vocabulary)]),
        top_p=rng.choice([1.0, 0.9, 0.5, 1e-6, rng.uniform(0.001, 1)]),
        repetition_penalty=rng.choice([1.0, 1.3, 2.0]),
    )


def by_transformers(logits: torch.Tensor, request: SampleRequest) -> torch.Tensor:
    settings = request.settings
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature != 1:
        processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k is not None:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    return processors(torch.tensor([request.history], dtype=torch.long), logits.float()[None])[0]


@pytest.mark.parametrize("seed", range(150))
def test_processed_logits_equal_transformers(seed: int) -> None:
    logits, one = random_case(random.Random(seed))
    ours, theirs = processed_logits(logits, one), by_transformers(logits, one)
    distinct = len(logits.unique()) == len(logits)
    if not distinct:  # transformers' top_p cuts among equal logits in the order of an unstable sort
        ours, theirs = ours.sort().values, theirs.sort().values
    torch.testing.assert_close(ours, theirs)


def test_the_order_is_that_of_generate() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.25
    )
    model = LlamaForCausalLM(config).eval()
    history = [1, 5, 9, 5]
    ids = torch.tensor([history])
    one = request(do_sample=True, history=history, temperature=0.6, top_k=20, top_p=0.8, repetition_penalty=1.5)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.5,
        max_new_tokens=1,
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ours = processed_logits(generated.logits[0][0], one)
    assert 1 < ours.isfinite().sum() < 20
    torch.testing.assert_close(ours, generated.scores[0][0])


@pytest.mark.parametrize("seed", range(150))
def test_the_quick_way_draws_what_the_reference_draws(seed: int) -> None:
    logits, one = random_case(random.Random(seed))
    processed = processed_logits(logits, one)
    kept = processed.isfinite().nonzero()[:, 0]
    drawn = kept[sampler._invert(processed[kept], uniform(one.settings.seed, one.position))]
    assert sample(logits[None], [one])[0].token_id == drawn


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nucleus_without_a_full_sort_is_the_reference_s(scale: float, top_p: float, dtype: torch.dtype) -> None:
    for seed in range(10):
        scores = (torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).float()
        kept = processed_logits(scores, request(do_sample=True, top_p=top_p)).isfinite().nonzero()[:, 0]
        assert sampler._nucleus(scores, top_p).equal(kept)


def test_the_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -6.0])
    one = {"do_sample": True, "temperature": 0.8, "top_p": 0.97, "seed": 5}
    draws = 4000
    tokens = Counter(s.token_id for s in sample(logits.expand(draws, -1), [request(position=i, **one) for i in range(draws)]))
    expected = processed_logits(logits, request(**one)).softmax(-1).tolist()
    assert expected[5] == tokens[5] == 0
    chi_square = sum((tokens[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(expected) if p)
    assert chi_square < 18.47  # 4 degrees of freedom, 1 in 1000


def test_uniform_is_splitmix64_and_even_over_positions_and_seeds() -> None:
    assert sampler._mix(0) == 0xE220A8397B1DCDAF
    for numbers in ([uniform(7, position) for position in range(4000)], [uniform(seed, 7) for seed in range(4000)]):
        assert all(0 <= number < 1 for number in numbers)
        counts = Counter(int(number * 10) for number in numbers)
        assert sum((counts[i] - 400) ** 2 / 400 for i in range(10)) < 27.88  # 9 degrees of freedom, 1 in 1000
    assert uniform(2**32 + 7, 3) != uniform(7, 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gets_the_same_alone_and_among_others(threads: int) -> None:
    torch.set_num_threads(threads)
    logits = torch.randn(32, 50_001, generator=torch.Generator().manual_seed(0)) * 4
    kinds: list[dict[str, object]] = [
        {},
        {"repetition_penalty": 1.5},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_logprobs": 3},
        {"do_sample": True, "top_k": 50, "repetition_penalty": 1.2},
    ]
    requests = [request(position=row, seed=9, history=[row, 3, 5], **kinds[row % 5]) for row in range(32)]
    together = sample(logits, requests)
    assert together == [sample(logits[row : row + 1], requests[row : row + 1])[0] for row in range(32)]
    assert together[::-1] == sample(logits.flip(0), requests[::-1])


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.zeros(1, 1000)
    [first] = sample(logits, [request(do_sample=True, seed=1, position=2, history=[1])])
    assert [first] == sample(logits, [request(do_sample=True, seed=1, position=2, history=[5, 6])])
    others = [sample(logits, [request(do_sample=True, seed=s, position=p)])[0].token_id for s, p in [(1, 3), (2, 2), (2, 1)]]
    assert first.token_id not in others


def test_greedy_takes_the_first_of_equal_logits_after_the_penalty() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 2.9]])
    assert sample(logits, [request()])[0].token_id == 1
    assert sample(logits, [request(repetition_penalty=1.01, history=[1])])[0].token_id == 2
    assert sample(logits, [request(repetition_penalty=2.0, history=[1, 2, 2, 99])])[0].token_id == 3
    assert sample(-logits, [request(repetition_penalty=2.0, history=[1])])[0].token_id == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0]], dtype=dtype)
    expected = logits[0].float().log_softmax(-1)
    [greedy, drawn] = sample(
        logits.expand(2, -1),
        [request(top_logprobs=3), request(do_sample=True, temperature=0.01, top_k=1, repetition_penalty=2.0, history=[1])],
    )
    assert greedy.top_logprobs == tuple((token, pytest.approx(float(expected[token]))) for token in (1, 2, 0))
    assert greedy.logprob == greedy.top_logprobs[0][1]
    assert (drawn.token_id, drawn.top_logprobs) == (2, ())
    assert drawn.logprob == pytest.approx(float(expected[2]))


def test_more_top_logprobs_than_tokens_are_all_tokens() -> None:
    [sampled] = sample(torch.zeros(1, 3), [request(top_logprobs=20)])
    assert [token for token, _ in sampled.top_logprobs] == [0, 1, 2]


def test_no_rows() -> None:
    assert sample(torch.empty(0, 5), []) == []


def test_top_k_above_the_vocabulary_is_refused() -> None:
    assert sample(torch.zeros(1, 5), [request(do_sample=True, top_k=5)])
    with pytest.raises(InvalidSetting, match="top_k: 6 is more than the vocabulary's 5 tokens"):
        sample(torch.zeros(1, 5), [request(do_sample=True, top_k=6)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_drawn_from_a_row_that_is_not_finite_and_the_others_are_as_they_would_be(bad: float) -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    expected = sample(logits, [request(do_sample=True)] * 3)
    logits[1, 2] = bad
    assert sample(logits, [request(do_sample=True)] * 3) == [expected[0], None, expected[2]]


def test_rows_and_requests_must_agree() -> None:
    with pytest.raises(AssertionError, match="2 rows of logits for 1 requests"):
        sample(torch.zeros(2, 5), [request()])


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e25, 1e29, 1e35])
@pytest.mark.parametrize("cuts", [{}, {"top_p": 1e-6}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 5, "top_p": 0.9}, {"top_k": 100}])
def test_the_ends_of_the_ranges_are_drawn_from_logits_of_any_size(scale: float, cuts: dict[str, float]) -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0)) * scale
    for temperature in (0.001, 2.0):
        asked = request(do_sample=True, temperature=temperature, repetition_penalty=2.0, history=[3, 50], **cuts)
        (drawn,) = sample(logits, [asked])
        assert drawn is None if scale > 1e30 else drawn is not None and 0 <= drawn.token_id < 100


def test_ids_outside_the_vocabulary_are_penalized_nowhere() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    (plain,), (odd,) = (
        sample(logits, [request(repetition_penalty=2.0, history=history)]) for history in ([5], [5, -1, -(10**9), 100, 2**62])
    )
    assert plain == odd
