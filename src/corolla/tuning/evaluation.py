"""How well a model predicts data: loss and perplexity on what is trained on, through sessions, so on any swarm too."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

from corolla.client.session import Session
from corolla.data.tokens import Tokens
from corolla.errors import DataError, ServerFault, TrainingError
from corolla.types import GenerationSettings

ABSURD = 3.0  # times ln(vocabulary), a loss that no language model has
_AT_ONCE = 4  # articles: the servers of a route have something to do each
_SCORED = GenerationSettings(max_tokens_to_generate=1, prompt_logprobs=True)


@dataclass(frozen=True, slots=True)
class ArticleLoss:
    """The sum of -ln p over the tokens of an article that are trained on (natural), and how many they are.

    The first token of all is predicted from nothing and does not count, as in training.
    """

    total: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.total / self.tokens


@dataclass(slots=True)
class Loss:
    """Over articles; every token counts the same."""

    articles: list[ArticleLoss] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(article.tokens for article in self.articles)

    @property
    def loss(self) -> float:
        """Nats a token. Raises `DataError` where there is none."""
        if not self.tokens:
            raise DataError("no token of the data is trained on: there is nothing to evaluate")
        return math.fsum(article.total for article in self.articles) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond it a float is infinite

    def summary(self) -> dict[str, float | int]:
        """For JSON."""
        return {"articles": len(self.articles), "tokens": self.tokens, "loss": self.loss, "perplexity": self.perplexity}


def check_loss(loss: float, vocabulary: int, when: str, remedy: str) -> None:
    """Raises `TrainingError` for a loss, in nats a token, that is not finite or above `ABSURD` times ln(vocabulary).

    A model that knows nothing gives each of V tokens 1 / V, a loss of ln V: far above it no model is read as it was made.

    Args:
        when: to what the loss belongs, as in "before training".
        remedy: what to do about it.
    """
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is not finite {when}: {remedy}")
    chance = math.log(vocabulary)
    if loss > ABSURD * chance:
        raise TrainingError(f"the loss is {loss:.4g} nats a token {when}, where guessing gives {chance:.2f}: {remedy}")


def evaluate(
    articles: Iterable[Tokens], session: Callable[[], Session], *, timeout: float = 600.0, report: Callable[[int], None] | None = None
) -> Loss:
    """The loss on the articles' trained-on tokens, each article in a session of its own; `report` is told how many are done.

    Raises what `Session.generate` raises, and `PromptTooLong` for an article that the context does not hold with one more token.
    """
    loss = Loss()
    with closing(_scored(iter(articles), session, timeout)) as scored:
        for article in scored:
            if article.tokens:
                loss.articles.append(article)
            if report is not None:
                report(len(loss.articles))
    return loss


def _scored(articles: Iterator[Tokens], session: Callable[[], Session], timeout: float) -> Generator[ArticleLoss]:
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="corolla-evaluate") as pool:
        waiting: list[Future[ArticleLoss]] = [pool.submit(article_loss, a, session, timeout) for a in islice(articles, 2 * _AT_ONCE)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(article_loss, article, session, timeout) for article in islice(articles, 1)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def article_loss(article: Tokens, session: Callable[[], Session], timeout: float = 600.0) -> ArticleLoss:
    """The loss on one article. Raises like `evaluate`, and `ServerFault` where a token was not scored."""
    with session() as opened:
        before = len(opened.prefix)
        for _ in opened.generate(article.input_ids.tolist(), _SCORED, timeout=timeout):
            pass
        trained = [before + index for index, wanted in enumerate(article.trained.tolist()) if wanted]
        if missing := [position for position in trained if position and position not in opened.scores]:
            raise ServerFault(f"the server scored {len(trained) - len(missing)} of {len(trained)} tokens: evaluate again")
        scores = [opened.scores[position].logprob for position in trained if position]
    return ArticleLoss(-math.fsum(scores), len(scores))
