"""What a prompt's own tokens score, against the stock model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corolla.engine.engine import Engine, EngineConfig
from corolla.engine.sampler import score
from corolla.errors import ServerFault
from corolla.messages import Reply, Scores, Token
from corolla.models.reference import Reference
from corolla.models.span import load_span
from corolla.types import GenerationSettings, Step
from tests.models import tiny

PROMPT = [5 + i * 11 % 180 for i in range(90)]
SETTINGS = GenerationSettings(max_tokens_to_generate=3, prompt_logprobs=True, top_logprobs=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def answered(engine: Engine, session: str, settings: GenerationSettings = SETTINGS) -> list[Reply]:
    replies: list[Reply] = []
    engine.receive(Step(session, 0, PROMPT, settings=settings), replies.append)
    while engine.run_once():
        engine.check_integrity()
    return replies


@pytest.mark.parametrize("invariant", [False, True])
def test_every_token_after_the_first_scores_as_in_the_stock_model(directory: Path, invariant: bool) -> None:
    engine = Engine(load_span(directory, dtype="float32"), EngineConfig(page_size=16, step_rows=32, batch_invariant=invariant))
    answered(engine, "earlier", GenerationSettings(max_tokens_to_generate=1))  # whose pages could be shared
    replies = answered(engine, "a")
    scores = [score for reply in replies if isinstance(reply, Scores) for score in reply.scores]
    with torch.inference_mode():
        logprobs = Reference(directory).model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([each.logprob for each in scores]), expected, rtol=1e-4, atol=1e-4)
    assert [each.top_logprobs[0][0] for each in scores] == logprobs[:-1].argmax(-1).tolist()
    assert [isinstance(reply, Token) for reply in replies[-4:]] == [False, True, True, True]


def test_rows_that_are_not_finite_are_the_servers_fault() -> None:
    with pytest.raises(ServerFault, match="NaN"):
        score(torch.full((1, 4), float("nan")), [1], 0)
