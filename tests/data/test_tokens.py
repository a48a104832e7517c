"""Where tokens begin in a text."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from corolla.data.tokens import TrainingTokenizer
from corolla.errors import CallerError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TrainingTokenizer:
    return TrainingTokenizer(toy.make_directory(tmp_path_factory.mktemp("toy"), toy.byte_level()))


@given(text=st.text(st.sampled_from("ab .,!?\n  <>:#é☃/s")), data=st.data())
@settings(deadline=None, max_examples=200)
def test_places_are_those_of_the_librarys_offsets(tokenizer: TrainingTokenizer, text: str, data: st.DataObject) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text) + 1), max_size=4)))
    encoding = Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json")).encode(text, add_special_tokens=False)
    starts = [start for start, _ in encoding.offsets]
    assert tokenizer.encode_located(text, places, plain=False) == (encoding.ids, [bisect_left(starts, place) for place in places])


def test_what_is_no_unicode(tokenizer: TrainingTokenizer) -> None:
    with pytest.raises(CallerError, match="not valid Unicode"):
        tokenizer.encode_located("a\ud800", [1], plain=True)
