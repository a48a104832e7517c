from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corolla.engine.engine import Engine, EngineConfig
from corolla.models.span import load_span
from corolla.server.measuring import Meter, measure_throughput
from corolla.types import Span
from tests.models import tiny

DEADLINE = 30.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def make(directory: Path) -> Iterator[Callable[[Span], Engine]]:
    engines: list[Engine] = []

    def made(span: Span) -> Engine:
        engines.append(Engine(load_span(directory, span, dtype="float32"), EngineConfig(cache_tokens=256)))
        return engines[-1]

    yield made
    for engine in engines:
        engine.stop()


@pytest.mark.parametrize("span", [Span(0, 4), Span(0, 1), Span(1, 3), Span(3, 4)])
def test_any_span_is_measured_and_left_as_it_was(make: Callable[[Span], Engine], span: Span) -> None:
    engine = make(span)
    assert measure_throughput(engine) > 0
    assert engine.active == 0
    assert engine.free_tokens == 256


def test_a_meter_follows_what_is_served(make: Callable[[Span], Engine]) -> None:
    now = [0.0]
    engine = make(Span(1, 3))
    meter = Meter(engine, first=1000.0, clock=lambda: now[0])
    now[0] = 5.0
    engine.counters.light_steps += 7
    engine.counters.light_seconds += 7 / 100
    meter.update()
    assert meter.throughput == pytest.approx(1000)  # too few to tell
    engine.counters.light_steps += 1
    engine.counters.light_seconds += 1 / 100
    meter.update()
    assert meter.throughput == pytest.approx(1 / (0.5 / 1000 + 0.5 / 100))
    for _ in range(10):
        now[0] += 5.0
        engine.counters.light_steps += 100
        engine.counters.light_seconds += 100 / 100
        meter.update()
    assert meter.throughput == pytest.approx(100, rel=0.2)


def test_noise_is_not_noticed(make: Callable[[Span], Engine]) -> None:
    now = [0.0]
    engine = make(Span(1, 3))
    meter = Meter(engine, first=100.0, clock=lambda: now[0])
    for measured in (90, 115, 85, 118):
        now[0] += 10.0
        engine.counters.light_steps += 100
        engine.counters.light_seconds += 100 / measured
        meter.update()
        assert meter.throughput == 100


def test_an_idle_server_measures_itself_again(make: Callable[[Span], Engine]) -> None:
    now = [0.0]
    engine = make(Span(0, 4))
    engine.start()
    meter = Meter(engine, first=1e-3, clock=lambda: now[0])
    now[0] = 29.0
    meter.update()
    assert engine.counters.light_steps == 0
    now[0] = 30.0
    meter.update()
    assert engine.counters.light_steps == 8
    assert meter.throughput > 0.05
    deadline = time.monotonic() + DEADLINE
    while engine.free_tokens < 256:  # its session is closed
        assert time.monotonic() < deadline
        time.sleep(0.01)
