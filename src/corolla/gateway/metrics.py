"""What Prometheus is told: of answers by model, of errors by kind, and of the gateway's own state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from corolla.barrier import unexpected
from corolla.client.completion import CompletionResult
from corolla.errors import CorollaError

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_QUEUED = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)


class TokenRate:
    """How many a second of something that happens all the time, over the last few seconds. For any thread."""

    def __init__(self, seconds: int = 5) -> None:
        self._seconds = seconds
        self._counts: dict[int, int] = {}  # by whole second

    def count(self) -> None:
        """It happened once more. (Two threads at once may lose one: it is a figure to look at.)"""
        now = int(time.monotonic())
        self._counts[now] = self._counts.get(now, 0) + 1
        if len(self._counts) > self._seconds + 1:
            self._counts.pop(min(self._counts), None)

    @property
    def per_second(self) -> float:
        """Over the whole seconds that are past."""
        now = int(time.monotonic())
        return sum(self._counts.get(now - back, 0) for back in range(1, self._seconds + 1)) / self._seconds


class Metrics:
    """Counters and histograms of one gateway. For any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.rate = TokenRate()  # of tokens

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"corolla_{name}_seconds", about, ["model"], buckets=buckets, registry=self.registry)

        self._first = histogram("first_token", "From the beginning of an answer to its first token.", _FIRST)
        self._between = histogram("between_tokens", "Between two tokens of an answer, its mean.", _BETWEEN)
        self._queued = histogram("queue", "That a request waited for its turn.", _QUEUED)
        self._answers = Counter("corolla_answers", "Answers, by how they ended.", ["model", "end"], registry=self.registry)
        self._tokens = Counter("corolla_tokens", "Tokens of answers.", ["model"], registry=self.registry)
        self._prompts = Counter(
            "corolla_prompt_tokens", "Tokens of prompts; cached ones were not computed again.", ["model", "cached"], registry=self.registry
        )
        self.registry.register(_Unexpected())
        self._errors = Counter("corolla_errors", "Requests that ended in an error, by its kind.", ["kind"], registry=self.registry)

    def answered(self, model: str, queued: float, result: CompletionResult | None, error: CorollaError | None) -> None:
        """An answer has ended."""
        self._queued.labels(model).observe(queued)
        end = type(error).__name__ if error is not None else "interrupted"
        if result is not None:
            if error is None and result.finish_reason is not None:
                end = result.finish_reason.value
            timings = result.timings
            if timings.first_token_s is not None:
                self._first.labels(model).observe(timings.first_token_s)
            if timings.tokens_per_s:
                self._between.labels(model).observe(1 / timings.tokens_per_s)
            self._tokens.labels(model).inc(len(result.token_ids))
            self._prompts.labels(model, "true").inc(result.cached_tokens)
            self._prompts.labels(model, "false").inc(result.prompt_tokens - result.cached_tokens)
        self._answers.labels(model, end).inc()

    def failed(self, kind: str) -> None:
        """A request was answered with an error."""
        self._errors.labels(kind).inc()

    def watch(self, look: Callable[[], dict[str, float]]) -> None:
        """Ask for these gauges whenever somebody reads: names without `corolla_`."""
        self.registry.register(_Gauges(look))

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)


class _Unexpected(Collector):
    """What the barriers of this process caught."""

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "corolla_unexpected_errors", "Errors that nobody expected, by where they were caught.", labels=["barrier"]
        )
        for name, count in list(unexpected.items()):
            family.add_metric([name], count)
        yield family


class _Gauges(Collector):
    def __init__(self, look: Callable[[], dict[str, float]]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        for name, value in self._look().items():
            yield GaugeMetricFamily(f"corolla_{name}", name.replace("_", " "), value=value)
