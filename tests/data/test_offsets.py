"""Many texts as tokens at once: places are those of the library's offsets, whatever the tokenizer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, processors

from corolla.data.offsets import Text
from corolla.data.tokens import TrainingTokenizer
from corolla.errors import CallerError


def trimming() -> Tokenizer:
    """As GPT-2's: a blank belongs to the word after it, and its place does not."""
    tokenizer = toy.byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def normalizing() -> Tokenizer:
    tokenizer = toy.byte_level()
    tokenizer.normalizer = normalizers.Replace("b", "bb")
    return tokenizer


def swallowing() -> Tokenizer:
    """With a token that takes the blanks around it."""
    tokenizer = toy.byte_level()
    tokenizer.add_special_tokens([AddedToken("#", lstrip=True, rstrip=True)])
    return tokenizer


@pytest.fixture(scope="module", params=[toy.byte_level, toy.metaspace, trimming, normalizing, swallowing])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainingTokenizer:
    make: Callable[[], Tokenizer] = request.param
    return TrainingTokenizer(toy.make_directory(tmp_path_factory.mktemp("toy"), make()))


@given(data=st.data(), plain=st.booleans())
@settings(deadline=None, max_examples=60)
def test_places_are_those_of_the_librarys_offsets(tokenizer: TrainingTokenizer, data: st.DataObject, plain: bool) -> None:
    library = Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    library.encode_special_tokens = plain
    texts, expected = [], []
    for text in data.draw(st.lists(st.text(st.sampled_from("ab .,!?\n  <>:#é☃/s")), max_size=5)):
        places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        encoding = library.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        texts.append(Text(text, places, plain))
        expected.append((encoding.ids, [bisect_left(starts, place) for place in places]))
    assert tokenizer.locate(texts) == expected


def test_what_is_no_unicode_is_an_error_of_its_own(tokenizer: TrainingTokenizer) -> None:
    before, broken, after = tokenizer.locate([Text("a"), Text("a\ud800", [1]), Text("b")])
    assert (before, after) == (*tokenizer.locate([Text("a")]), *tokenizer.locate([Text("b")]))
    assert isinstance(broken, CallerError)
    assert str(broken) == "the text is not valid Unicode: check its encoding"
