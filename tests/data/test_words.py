"""A memory for words gives the tokens that the tokenizer gives, for every way of cutting words that it knows."""

from __future__ import annotations

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from corolla.data import words
from corolla.data.words import Words, words_of

BYTES, CUT_BYTES = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevel(add_prefix_space=False)
KNOWN = [CUT_BYTES, Sequence([Digits(individual_digits=True), CUT_BYTES])]
KNOWN += [Sequence([Split(Regex(pattern), "isolated"), BYTES]) for pattern in words._SPLITS]


def cutting(pre_tokenizer: ByteLevel | Sequence) -> Tokenizer:
    tokenizer = toy.byte_level()
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


@pytest.fixture(scope="module", params=KNOWN, ids=["GPT-2", "SmolLM", "BLOOM", "Llama 3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return cutting(request.param)


PIECES = st.sampled_from([*"aZ09 \n\t\r'.,!?(|", "'s", "'LL", "  ", "1234"])
ASCII = st.lists(st.one_of(PIECES, st.characters(codec="ascii")), max_size=30).map("".join)


@given(text=ASCII)
@settings(deadline=None, max_examples=300)
def test_the_tokens_are_the_tokenizers(tokenizer: Tokenizer, text: str) -> None:
    known = words_of(tokenizer)
    assert known is not None
    assert known.tokens(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_what_the_library_has_to_be_asked_for() -> None:
    tokenizer = toy.byte_level()
    known = words_of(tokenizer)
    assert known is not None
    assert known.tokens("née") is None
    assert known.tokens("a </s>") is None
    tokenizer.encode_special_tokens = True
    plain = words_of(tokenizer)
    assert plain is not None
    assert plain.tokens("a </s>") == tokenizer.encode("a </s>", add_special_tokens=False).ids
    tokenizer.add_tokens([AddedToken("mine")])
    added = words_of(tokenizer)
    assert added is not None
    assert added.tokens("a mine") is None


def test_tokenizers_of_another_make_have_none() -> None:
    assert words_of(toy.metaspace()) is None
    assert words_of(cutting(ByteLevel(add_prefix_space=True))) is None
    assert words_of(cutting(Sequence([Split(Regex("a|b"), "isolated"), BYTES]))) is None
    assert words_of(cutting(Sequence([Digits(individual_digits=False), CUT_BYTES]))) is None
    changing = toy.byte_level()
    changing.normalizer = normalizers.Lowercase()
    assert words_of(changing) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MOST", 3)
    tokenizer = toy.byte_level()
    known = Words(tokenizer, words._GPT2)
    text = f"one two three four five one {'long' * 100}"
    assert known.tokens(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert 0 < len(known) <= 3
    assert max(map(len, known)) < 10
