"""Whether an answer is the stock model's: every token, and every log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from corolla.engine.sampler import SampleRequest, sample
from corolla.models.reference import Reference
from corolla.types import GenerationSettings

TOLERANCE = 1e-3  # nats; float32 in another order of its sums stays below a tenth of it


@dataclass
class Verdict:
    """Of one answer, or of several."""

    wrong: list[str] = field(default_factory=list)
    near_ties: int = 0  # tokens that another order of the same sums may give just as well
    farthest: float = 0.0  # of a token's log-probability from the stock model's

    def add(self, other: Verdict) -> None:
        self.wrong += other.wrong
        self.near_ties += other.near_ties
        self.farthest = max(self.farthest, other.farthest)


@torch.inference_mode()
def judge(
    reference: Reference, history: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float], settings: GenerationSettings
) -> Verdict:
    """Compare the `tokens` of an answer behind `history`, and their log-probabilities, with what the stock model gives."""
    verdict = Verdict()
    if not tokens:
        return verdict
    everything = [*history, *tokens]
    logits = reference.model(torch.tensor([everything[:-1]])).logits[0, len(history) - 1 :]
    # A row that is wrong in some server's cache changes few tokens, but every probability behind it.
    apart = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0] - torch.tensor(logprobs)
    verdict.farthest = float(apart.abs().max())
    if not bool((apart.abs() <= TOLERANCE).all()):
        row = int((apart.abs() <= TOLERANCE).int().argmin())
        verdict.wrong.append(f"log-probability {apart[row]:+.1e} off at {len(history) + row}, {settings}")
    requests = [SampleRequest(settings, place, everything[:place]) for place in range(len(history), len(everything))]
    for row, expected in enumerate(sample(logits, requests)):
        assert expected is not None, "the stock model's logits are finite"
        if expected.token_id == tokens[row]:
            continue
        nearby = logits[row] + 1e-4 * torch.randn(200, logits.shape[1])
        if any(other is not None and other.token_id == tokens[row] for other in sample(nearby, [requests[row]] * len(nearby))):
            verdict.near_ties += 1
        else:
            verdict.wrong.append(
                f"token {tokens[row]}, number {row} of {len(tokens)} behind {len(history)} others, where {expected.token_id} belongs; "
                f"its log-probability is {apart[row]:+.1e} off; {settings}"
            )
    return verdict
