"""PersonaChat as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.readers.writing import PERSONACHAT, a, examples, q, written

from corolla.errors import DataError


def test_personachat_as_json(tmp_path: Path) -> None:
    path = written(tmp_path / "personachat.json", json.dumps({"train": [PERSONACHAT, PERSONACHAT], "valid": [PERSONACHAT]}))
    train = examples(path)
    assert train[0].turns == (q("Hi!"), a("Hello!"), q("What?"), a("Songs."))
    assert train[0].persona == ("I sing.", "I have a cat.")
    assert [example.place.line for example in train] == [1, 2]
    assert len(examples(path, split="valid")) == 1
    with pytest.raises(DataError, match="has the parts train, valid, but nothing in 'test'"):
        examples(path, split="test")
