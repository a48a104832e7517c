"""Recipes: those that come with Corolla, files of one's own, changes, and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from corolla.errors import InvalidSetting
from corolla.tuning.recipe import load_recipe, names


@pytest.mark.parametrize("name", names())
def test_a_recipe_written_down_reads_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "copy.yaml").write_text(recipe.dump())
    assert load_recipe(str(tmp_path / "copy.yaml")) == recipe


def test_sft_chat_is_as_its_model_card_says() -> None:
    recipe = load_recipe("sft-chat")
    assert (recipe.label_smoothing, recipe.amsgrad, recipe.betas, recipe.learning_rate) == (0.05, True, (0.9, 0.999), 5e-4)
    assert (recipe.schedule, recipe.div_factor, recipe.final_div_factor) == ("one-cycle", 100, 0.1)
    assert (recipe.batch, recipe.accumulation, recipe.max_length, recipe.dtype) == (16, 25, 1500, "bfloat16")
    assert (recipe.template, recipe.equal_shares) == ("sft-chat", ("fr", "en"))


def test_bloomchat_is_as_its_model_card_and_its_scripts_say() -> None:
    recipe = load_recipe("bloomchat")
    assert (recipe.schedule, recipe.warmup, recipe.end_ratio, recipe.loss, recipe.packing) == ("cosine", 0, 0.1, "answers", "greedy")
    assert (recipe.phases[0].epochs, recipe.phases[0].samples, recipe.phases[1].epochs) == (1, 100_000, 3)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.clip, recipe.global_batch) == (1e-5, 0.1, 1.0, 128)
    assert len(recipe.phases) == 2


def test_a_change_is_read_as_yaml_and_a_number_may_have_an_exponent_without_a_point() -> None:
    recipe = load_recipe("chat", ["learning_rate=1e-5", "clip=null", "betas=[0.8, 0.9]", "phases=[{epochs: 3}]"])
    assert (recipe.learning_rate, recipe.clip, recipe.betas, recipe.phases[0].epochs) == (1e-5, None, (0.8, 0.9), 3.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lr=3", "no such setting"),
        ("batch=many", "batch: Expected `int`"),
        ("schedule=step", "schedule"),
        ("phases=3", "phases"),
        ("phases=[{epochs: 0}]", "more than 0"),
        ("phases=[{speed: 1}]", "no such setting"),
        ("label_smoothing=1", r"\[0, 1\)"),
        ("template=mine", "there is no 'mine'"),
        ("learning_rate=0", "not above 0"),
        ("batch: 3", "KEY=VALUE"),
        ("betas=[0.9", "no YAML"),
    ],
)
def test_a_mistake_is_named(change: str, said: str) -> None:
    with pytest.raises(InvalidSetting, match=said):
        load_recipe("chat", [change])


def test_a_recipe_that_there_is_not_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="name a file, or one of bloomchat, chat"):
        load_recipe("cake")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(InvalidSetting, match="holds no settings"):
        load_recipe(str(tmp_path / "empty.yaml"))
