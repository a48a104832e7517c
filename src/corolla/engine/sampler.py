"""From logits to the next token: greedy or drawn, one row a session.

The semantics are those of transformers' `generate`: repetition penalty, then (only when sampling) temperature, top_k, top_p.
What a row gets depends on that row and its request alone, never on the rows beside it, and its draw on (seed, position)
alone: so an answer that is recovered on another server goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from corolla.errors import InvalidSetting, ServerFault
from corolla.messages import Score
from corolla.types import GenerationSettings


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What one row of logits is to be sampled by."""

    settings: GenerationSettings
    position: int  # the place that the new token takes in the session
    history: Sequence[int]  # the session's token ids so far, for the repetition penalty


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token; log-probabilities are natural, of the raw logits before penalty, temperature and cuts."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]  # the most likely tokens, falling; of equal ones the lower id first


def check_vocabulary(settings: GenerationSettings, vocabulary: int) -> None:
    """Raises `InvalidSetting` where the settings ask for more tokens than the vocabulary has."""
    if settings.top_k is not None and settings.top_k > vocabulary:
        raise InvalidSetting("top_k", f"{settings.top_k} is more than the vocabulary's {vocabulary} tokens")


_LARGEST = 1e30  # of sound logits: what settings divide or multiply by leaves them inside float32


@torch.inference_mode()
def sample(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[Sampled | None]:
    """The next token of each row of `logits` [rows, vocabulary] (any float dtype; computed in float32); None for a row with
    NaN, infinity or magnitudes above 1e30, from which nothing can be drawn.

    Raises `InvalidSetting` for a `top_k` above the vocabulary.
    """
    assert logits.ndim == 2, f"logits of shape {tuple(logits.shape)} are not [rows, vocabulary]"
    assert len(logits) == len(requests), f"{len(logits)} rows of logits for {len(requests)} requests"
    if not requests:
        return []
    vocabulary = logits.shape[1]
    for request in requests:
        check_vocabulary(request.settings, vocabulary)
    scores = logits.float()
    highest, best = scores.max(dim=-1)  # the first of equal ones; NaN wins
    lowest = scores.amin(dim=-1)
    sound = [high < _LARGEST and low > -_LARGEST for high, low in zip(highest.tolist(), lowest.tolist(), strict=True)]
    tokens = best.tolist()
    for row, request in enumerate(requests):
        settings = request.settings
        if not sound[row]:
            continue
        if settings.do_sample:
            tokens[row] = _draw(scores[row], request)
        elif settings.repetition_penalty != 1:
            tokens[row] = int(_penalized(scores[row], request).argmax())
    # The softmax works row by row, where a logsumexp of one row is split over threads and rounds differently from one of many.
    logprobs = scores.log_softmax(dim=-1)
    of_tokens = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    return [
        Sampled(token, logprob, _top(scores[row], logprobs[row], request.settings.top_logprobs)) if sound[row] else None
        for row, (token, logprob, request) in enumerate(zip(tokens, of_tokens, requests, strict=True))
    ]


@torch.inference_mode()
def score(logits: torch.Tensor, tokens: Sequence[int], top_logprobs: int) -> list[Score]:
    """What each row of `logits` [rows, vocabulary] gives the token that followed it, with the likeliest alternatives.

    Raises `ServerFault` for rows that hold NaN or infinity.
    """
    scores = logits.float()
    if not bool(scores.isfinite().all()):
        raise ServerFault("the logits hold NaN or infinity: the weights or the hidden states behind them are damaged")
    logprobs = scores.log_softmax(dim=-1)
    given = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    return [Score(value, _top(scores[row], logprobs[row], top_logprobs)) for row, value in enumerate(given)]


def processed_logits(row: torch.Tensor, request: SampleRequest) -> torch.Tensor:
    """One row's logits [vocabulary] after all that the settings ask for, float32, with -inf where a token is cut.

    The plain version, with its full sort: the reference that the quicker way of `sample` keeps to exactly.
    """
    settings = request.settings
    scores = _penalized(row.float(), request)
    if not settings.do_sample:
        return scores
    scores = scores / settings.temperature
    if settings.top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(settings.top_k).values[-1], -torch.inf)
    if settings.top_p < 1:
        rising, order = scores.sort(stable=True)
        cut = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
        cut[-1] = False
        scores = scores.masked_fill(torch.empty_like(cut).scatter(0, order, cut), -torch.inf)
    return scores


def _penalized(scores: torch.Tensor, request: SampleRequest) -> torch.Tensor:
    penalty = request.settings.repetition_penalty
    if penalty == 1:
        return scores
    seen = np.asarray(request.history, dtype=np.int64)
    # A model may have fewer logits than its tokenizer has tokens; those beyond cannot be drawn anyway.
    ids = torch.from_numpy(seen[(seen >= 0) & (seen < len(scores))]).to(scores.device)
    of_seen = scores[ids]
    return scores.index_put((ids,), torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty))


def _draw(row: torch.Tensor, request: SampleRequest) -> int:
    settings = request.settings
    scores = _penalized(row, request) / settings.temperature
    ids = None
    if settings.top_k is not None:
        ids = (scores >= scores.topk(settings.top_k).values[-1]).nonzero()[:, 0]
        scores = scores[ids]
    if settings.top_p < 1:
        inside = _nucleus(scores, settings.top_p)
        ids = inside if ids is None else ids[inside]
        scores = scores[inside]
    drawn = _invert(scores, uniform(settings.seed, request.position))
    return drawn if ids is None else int(ids[drawn])


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """The ids [kept], rising, that top_p leaves of `scores` [tokens].

    Of n tokens, those of a probability up to (1 - top_p) / 2n have too little together for any of them to be kept, so only the
    few others are sorted; all are where the cut comes so near to one that the reference's float32 rounding decides.
    """
    outside = 1 - top_p
    weights = scores.softmax(dim=-1)
    total = float(weights.sum(dtype=torch.float64))
    likely = (weights > outside / (2 * len(scores))).nonzero()[:, 0]
    candidates = scores[likely]
    rising = _rising(candidates)
    mass = _rising(weights[likely]).cumsum(dim=0, dtype=torch.float64)
    mass = (mass + (total - mass[-1])) / total
    if bool(((mass[:-1] - outside).abs() < 1e-4 * outside).any()):  # the float32 of either way errs by less than 1e-5 of it
        likely, candidates, rising = torch.arange(len(scores), device=scores.device), scores, _rising(scores)
        mass = rising.softmax(dim=-1).cumsum(dim=-1)
    removed = int((mass[:-1] <= outside).sum())
    lowest = rising[removed]
    kept = candidates >= lowest
    # Of the tokens that equal the lowest kept one, the reference's stable sort removes those of low ids.
    kept[(candidates == lowest).nonzero()[: removed - int((rising < lowest).sum()), 0]] = False
    return likely[kept]


def _rising(scores: torch.Tensor) -> torch.Tensor:
    """Sorted values; numpy has them in a quarter of the time that torch takes on a CPU for values and indices."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy()))
    return scores.sort().values


def _invert(scores: torch.Tensor, point: float) -> int:
    """The index at which the cumulative distribution of `scores` [tokens], in order of index, passes `point` in [0, 1)."""
    cumulative = (scores - scores.max()).exp().cumsum(dim=0, dtype=torch.float64)
    index = int(torch.searchsorted(cumulative, cumulative[-1] * point, right=True))
    return min(index, len(scores) - 1)


def _top(scores: torch.Tensor, logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    count = min(count, len(scores))
    ids = (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]  # topk alone would choose among equal ones as it likes
    ids = ids[scores[ids].sort(descending=True, stable=True).indices[:count]]
    return tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))


_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for (seed, position): output `position` of the SplitMix64 generator whose state is the mixed seed.

    SplitMix64 (Steele, Lea & Flood, 2014) in place of a `torch.Generator`: any position is reached at once, all 64 bits of the
    seed count (torch's CPU generator takes 32), and the stream is the same on every device and version of torch.
    """
    return (_mix(_mix(seed) + position * _GOLDEN) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    mixed = (state + _GOLDEN) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
