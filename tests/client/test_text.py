from __future__ import annotations

import pytest
import toy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corolla.client.text import Detokenizer, StopMatcher
from corolla.client.tokenizer import TextTokenizer


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(toy.make_directory(tmp_path_factory.mktemp("toy"), getattr(toy, request.param)()))


@given(text=st.text(st.sampled_from("ab é€😀👍🏽\n ") | st.characters(exclude_categories=["Cs"]), max_size=30), cut=st.integers(0, 30))
@settings(deadline=None, max_examples=150)
@example(text="😀😀😀😀 a", cut=8)
def test_pieces_join_to_the_text(tokenizer: TextTokenizer, text: str, cut: int) -> None:
    tokens = tokenizer.encode_plain(text)
    head, tail = tokens[:cut], tokens[cut:]
    whole, before = tokenizer.decode(tokens), tokenizer.decode(head)
    if not whole.startswith(before) or before.endswith("\ufffd"):
        head, tail, before = [], tokens, ""  # the cut fell into a character
    detokenizer = Detokenizer(tokenizer.decode, head)
    pieces = [detokenizer.push(token) for token in tail]
    assert before + "".join(pieces) + detokenizer.flush() == whole
    assert not any(piece.endswith("\ufffd") for piece in pieces)


def test_an_incomplete_character_is_held_back(tokenizer: TextTokenizer) -> None:
    first, *rest = tokenizer.encode_plain("é")[-2:]
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.encode_plain("caf"))
    assert detokenizer.push(first) == ""
    assert not detokenizer.settled
    assert [detokenizer.push(token) for token in rest] == ["é"]
    assert detokenizer.settled


def test_an_incomplete_character_at_the_end_is_replaced(tokenizer: TextTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    detokenizer.push(tokenizer.encode_plain("é")[-2])
    assert detokenizer.flush() == "\ufffd"


def test_the_first_piece_keeps_its_space(tokenizer: TextTokenizer) -> None:
    prompt = tokenizer.encode_plain("The capital of France is")
    answer = tokenizer.encode_plain("The capital of France is Paris")[len(prompt) :]
    detokenizer = Detokenizer(tokenizer.decode, prompt)
    assert "".join(map(detokenizer.push, answer)) == " Paris"


def test_special_tokens_have_no_text(tokenizer: TextTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    tokens = [*tokenizer.encode_plain("a"), toy.END, *tokenizer.encode_plain("x b")[-2:]]
    assert "".join(map(detokenizer.push, tokens)).replace(" ", "") == "ab"


def naive(text: str, stops: list[str]) -> str:
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)


@given(data=st.data(), text=st.text("ab#", max_size=25), stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=4))
@settings(deadline=None, max_examples=400)
def test_stops_are_cut_however_the_text_is_chunked(data: st.DataObject, text: str, stops: list[str]) -> None:
    matcher, out, rest = StopMatcher(stops), "", text
    while rest and not matcher.stopped:
        size = data.draw(st.integers(1, 4))
        out += matcher.push(rest[:size])
        rest = rest[size:]
        assert naive(text, stops).startswith(out)
    out += matcher.flush()
    assert out == naive(text, stops)
    assert matcher.stopped == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["<human>"])
    assert [matcher.push(piece) for piece in ("hi <", "hu", "ge> ", "<hum", "an>: no")] == ["hi ", "", "<huge> ", "", ""]
    assert matcher.stopped
    assert matcher.push("more") == matcher.flush() == ""
