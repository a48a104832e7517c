"""What of dialogues is trained on, what is held out, and in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corolla.chat.templates import TEMPLATES
from corolla.data.problems import Problems
from corolla.data.tokens import IGNORED, Tokens, TrainingTokenizer
from corolla.errors import DataError, InvalidSetting
from corolla.tuning.dialogues import DataSettings, Dialogues, collate, in_order, load_dialogues


@pytest.fixture(scope="module")
def tokenizer(models: dict[str, Path]) -> TrainingTokenizer:
    return TrainingTokenizer(models["llama"])


def loaded(dialogues: Path, tokenizer: TrainingTokenizer, **settings: Any) -> Dialogues:
    read = DataSettings(**{"data": str(dialogues), "held_out": 0.2, **settings})
    return load_dialogues(read, tokenizer, TEMPLATES["plain"], Problems(strict=True))


def articles(*lengths: int) -> list[Tokens]:
    return [Tokens(np.arange(n, dtype=np.int32) + 5, np.array([0] + [1] * (n - 1), np.int32)) for n in lengths]


def test_replies_only_are_trained_on_or_everything(dialogues: Path, tokenizer: TrainingTokenizer) -> None:
    article = loaded(dialogues, tokenizer).training.articles[0]
    trained = tokenizer.decode(article.input_ids[article.trained].tolist())
    assert "is here." in trained
    assert "where is" not in trained
    whole = loaded(dialogues, tokenizer, loss="all").training.articles[0]
    assert whole.trained.all()
    assert (whole.input_ids == article.input_ids).all()


def test_distractors_are_never_in_the_data(tmp_path: Path, tokenizer: TrainingTokenizer) -> None:
    path = tmp_path / "convai2.txt"
    lines = [f"1 your persona: i like {n}.\n2 hello {n}\tgood {n}\t\twrong one|another wrong|good {n}\n" for n in range(20)]
    path.write_text("".join(lines))
    both = loaded(path, tokenizer)
    said = [tokenizer.decode(article.input_ids.tolist()) for part in (both.training, both.held_out) for article in part.articles]
    assert len(said) == 20
    assert all("good" in text and "i like" in text and "wrong" not in text for text in said)


def test_held_out_dialogues_are_not_trained_on(dialogues: Path, tokenizer: TrainingTokenizer) -> None:
    both = loaded(dialogues, tokenizer, samples=20, held_out_samples=4)
    training, held_out = ({example.place for example in part.examples} for part in (both.training, both.held_out))
    assert (len(training), len(held_out)) == (20, 4)
    assert not training & held_out
    again = loaded(dialogues, tokenizer, samples=20, held_out_samples=4)
    assert again.described == both.described
    assert loaded(dialogues, tokenizer, samples=20, seed=1).described["training"] != both.described["training"]


def test_a_batch_is_padded_on_the_right_and_padding_is_not_trained_on() -> None:
    batch = collate(articles(3, 5))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED], [IGNORED, 6, 7, 8, 9]]
    assert batch["input_ids"].dtype == torch.long


def test_every_epoch_has_an_order_of_its_own() -> None:
    four = articles(2, 3, 4, 5)
    order = [len(article) for article in in_order(four, steps=4, batch=3, seed=0)]
    assert len(order) == 12
    assert sorted(order[:4]) == sorted(order[4:8]) == sorted(order[8:]) == [2, 3, 4, 5]
    assert len({tuple(order[:4]), tuple(order[4:8]), tuple(order[8:])}) > 1
    assert order == [len(article) for article in in_order(four, steps=4, batch=3, seed=0)]
    assert order[:6] == [len(article) for article in in_order(four, steps=2, batch=3, seed=0)]


def test_dialogues_without_a_reply_are_no_data(tmp_path: Path, tokenizer: TrainingTokenizer) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"{n}?"}]}) + "\n" for n in range(9)))
    with pytest.raises(DataError, match="has a reply"):
        loaded(path, tokenizer, held_out=0.0)


@pytest.mark.parametrize("settings", [{"held_out": -0.1}, {"samples": 0}, {"held_out_samples": 0}, {"max_length": 1}, {"truncation": "up"}])
def test_settings_outside_their_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(settings)).replace("_", "[-_]")):
        DataSettings(data="x", **settings)
