"""Losses through an engine against the stock model's, and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from corolla.client.session import Session
from corolla.data.tokens import Tokens
from corolla.engine.engine import Engine, EngineConfig
from corolla.errors import DataError, PromptTooLong
from corolla.models.reference import Reference
from corolla.models.span import load_span
from corolla.swarm.local import LocalTransport
from corolla.tuning.evaluation import ArticleLoss, Loss, evaluate
from corolla.tuning.evaluation_plot import plot_evaluation
from tests.models import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def session(directory: Path) -> Iterator[Callable[[], Session]]:
    engine = Engine(load_span(directory, dtype="float32"), EngineConfig(cache_tokens=512, page_size=16, step_rows=32))
    transport = LocalTransport()
    transport.listen("engine", engine.receive)
    engine.start()
    yield partial(Session, transport, "engine")
    engine.stop()


def article(length: int, seed: int) -> Tokens:
    draw = np.random.default_rng(seed)
    kinds = draw.integers(0, 2, length).astype(np.int32)
    kinds[0] = 1  # which nothing predicts
    kinds[-1] = 3
    return Tokens(draw.integers(3, tiny.VOCABULARY, length).astype(np.int32), kinds)


def test_the_loss_is_that_of_the_stock_model_on_what_is_trained_on(directory: Path, session: Callable[[], Session]) -> None:
    articles = [article(length, seed=length) for length in (2, 40, 90, 17, 61)]
    model, total, count = Reference(directory).model, 0.0, 0
    for each in articles:
        labels = torch.from_numpy(each.labels).long()
        with torch.inference_mode():
            logits = model(torch.from_numpy(each.input_ids).long()[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    told: list[int] = []
    loss = evaluate(articles, session, timeout=120, report=told.append)
    assert (loss.tokens, len(loss.articles)) == (count, 5)
    assert loss.loss == pytest.approx(total / count, rel=1e-4)
    assert loss.perplexity == pytest.approx(math.exp(total / count), rel=1e-3)
    assert told == [1, 2, 3, 4, 5]


def test_what_cannot_be_evaluated(session: Callable[[], Session]) -> None:
    with pytest.raises(PromptTooLong):
        evaluate([article(600, 0)], session, timeout=120)
    with pytest.raises(DataError, match="nothing to evaluate"):
        _ = evaluate([], session).loss


def test_a_model_without_hope_has_a_finite_perplexity() -> None:
    assert math.isfinite(Loss([ArticleLoss(5000.0, 2)]).perplexity)


def test_the_picture_is_a_whole_png(tmp_path: Path) -> None:
    plot_evaluation(tmp_path / "e.png", {"a": [1.0, 2.0], "b": [3.0]}, {"t": {"en": 1.2, "fr": 1.5}, "u": {"en": 1.1, "fr": 2.0}}, [3, 4])
    assert (tmp_path / "e.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    with pytest.raises(DataError, match="nothing to draw"):
        plot_evaluation(tmp_path / "none.png", {}, {}, [])
