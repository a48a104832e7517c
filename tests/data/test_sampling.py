"""A part of the examples, decided by a seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.chat.templates import Turn
from corolla.data.examples import Example, Place
from corolla.data.sampling import is_held_out, sampled
from corolla.errors import InvalidSetting


def example(text: str, line: int = 1) -> Example:
    return Example(turns=(Turn("user", text), Turn("assistant", "yes")), place=Place("x", line))


@given(total=st.integers(0, 60), count=st.integers(1, 60), seed=st.integers())
def test_a_sample_is_some_of_the_items_in_their_order(total: int, count: int, seed: int) -> None:
    sample = sampled(iter(range(total)), count, seed)
    assert len(sample) == min(total, count)
    assert sample == sorted(set(sample))
    assert set(sample) <= set(range(total))
    assert sample == sampled(range(total), count, seed)


def test_every_item_has_the_same_chance() -> None:
    taken = [0] * 20
    for seed in range(2000):
        for item in sampled(range(20), 5, seed):
            taken[item] += 1
    assert all(400 < times < 600 for times in taken)


def test_about_a_share_is_held_out() -> None:
    held = [is_held_out(example(str(number)), 0.2, seed=3) for number in range(2000)]
    assert 340 < sum(held) < 460
    assert held != [is_held_out(example(str(number)), 0.2, seed=4) for number in range(2000)]


@given(text=st.text(), share=st.floats(0, 1), seed=st.integers())
def test_the_same_dialogue_is_always_on_one_side(text: str, share: float, seed: int) -> None:
    assert is_held_out(example(text), share, seed) == is_held_out(example(text, line=9), share, seed)
    assert not is_held_out(example(text), 0, seed)
    assert is_held_out(example(text), 1, seed)


def test_bad_settings() -> None:
    with pytest.raises(InvalidSetting, match="samples: 0 examples are too few"):
        sampled([1], 0, seed=0)
    with pytest.raises(InvalidSetting, match=r"held-out: 1.5 is no share"):
        is_held_out(example("x"), 1.5, seed=0)
