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


def test_an_unknown_setting_and_one_given_twice() -> None:
    with pytest.raises(InvalidSetting, match="warmth"):
        GenerationSettings.parse(warmth=1)
    with pytest.raises(InvalidSetting, match="given twice"):
        GenerationSettings.parse(stop=["a"], stop_sequences=["b"])


@pytest.mark.parametrize(("start", "end"), [(2, 2), (3, 2), (-1, 2)])
def test_an_empty_span_is_refused(start: int, end: int) -> None:
    with pytest.raises(InvalidSetting, match="blocks"):
        Span(start, end)
