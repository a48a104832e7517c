"""Settings: their ranges, their spellings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from corolla.errors import InvalidSetting
from corolla.types import GenerationSettings, Span


def test_spellings_of_other_interfaces() -> None:
    settings = GenerationSettings.parse(max_new_tokens=5, stop="end", temperature=0.5, top_p=None)
    assert settings == GenerationSettings(max_tokens_to_generate=5, stop_sequences=("end",), temperature=0.5, do_sample=True)


def test_a_temperature_of_0_is_greedy() -> None:
    assert GenerationSettings.parse(temperature=0) == GenerationSettings()
    assert GenerationSettings.parse(temperature=0.0, do_sample=True) == GenerationSettings()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_tokens_to_generate", 0),
        ("max_tokens_to_generate", True),
        ("do_sample", 1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("temperature", 1e-39),  # subnormal in float32
        ("temperature", 0.0009),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("max_tokens_to_generate", 2**31),
        ("top_k", 2**63),
        ("top_p", 1e-39),
        ("top_p", float("nan")),
        ("repetition_penalty", float("nan")),
        ("seed", 2**63),
        ("stop_sequences", ["\ud800"]),
        ("stop_sequences", ["a"] * 1025),
        ("stop_sequences", ["a" * 10_000] * 2),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1] * 1025),
        ("top_k", 0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("repetition_penalty", 0.9),
        ("repetition_penalty", 2.1),
        ("top_logprobs", 21),
        ("seed", -1),
        ("stop_sequences", 5),
        ("stop_sequences", [""]),
        ("stop_sequences", ["a", 3]),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["a"]),
    ],
)
def test_a_value_outside_its_range_names_its_setting(setting: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=setting) as caught:
        GenerationSettings.parse(**{setting: value})
    assert caught.value.setting == setting


@pytest.mark.parametrize("setting", ["max_tokens_to_generate", "temperature", "seed", "stop_token_ids"])
def test_integers_of_thousands_of_digits_are_refused(setting: str) -> None:
    with pytest.raises(InvalidSetting, match=setting):
        GenerationSettings.parse(**{setting: [10**5000] if setting == "stop_token_ids" else 10**5000})


def test_the_ends_of_the_ranges_are_settings() -> None:
    GenerationSettings(temperature=0.001, top_p=1e-6, top_k=2**63 - 1, seed=2**63 - 1, max_tokens_to_generate=2**31 - 1)
    GenerationSettings(temperature=2, top_p=1, repetition_penalty=2, stop_token_ids=(2**63 - 1,) * 1024, stop_sequences=("a" * 16,) * 1024)


def test_an_unknown_setting_and_one_given_twice() -> None:
    with pytest.raises(InvalidSetting, match="warmth"):
        GenerationSettings.parse(warmth=1)
    with pytest.raises(InvalidSetting, match="given twice"):
        GenerationSettings.parse(stop=["a"], stop_sequences=["b"])


@pytest.mark.parametrize(("start", "end"), [(2, 2), (3, 2), (-1, 2)])
def test_an_empty_span_is_refused(start: int, end: int) -> None:
    with pytest.raises(InvalidSetting, match="blocks"):
        Span(start, end)
