from __future__ import annotations

from collections.abc import Iterator

import pytest
import toy
from fakes import FakeEngine

from corolla.chat.conversation import Conversation
from corolla.chat.dialogue import Dialogue
from corolla.chat.templates import TEMPLATES, Turn
from corolla.client.session import Session
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import InvalidSetting, PromptTooLong, ServerFault

GREEDY = {"temperature": 0, "max_new_tokens": 50}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(toy.make_directory(tmp_path_factory.mktemp("toy"), toy.byte_level(), template=toy.CHATML))


@pytest.fixture
def engine(tokenizer: TextTokenizer) -> Iterator[FakeEngine]:
    engine = FakeEngine(lambda history: [*tokenizer.encode(" fine, thank you!"), toy.END])
    yield engine
    engine.stop()


def dialogue(engine: FakeEngine, tokenizer: TextTokenizer, template: str = "bloomchat", **options: object) -> Dialogue:
    conversation = Conversation(tokenizer, TEMPLATES[template], context_length=500, system="Be kind.")
    return Dialogue(conversation, Session(engine.transport, "fake"), {**GREEDY, **options})


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_second_turn_sends_only_new_tokens(engine: FakeEngine, tokenizer: TextTokenizer, template: str) -> None:
    talk = dialogue(engine, tokenizer, template)
    for question in ("hello there", "and of Italy?"):
        assert "".join(piece.text for piece in talk.ask(question)).strip() == "fine, thank you!"
    assert talk.conversation.turns[2:] == [Turn("user", "and of Italy?"), talk.conversation.turns[1]]
    first, second = engine.steps
    before = len(first.payload)
    answer = len(tokenizer.encode(" fine, thank you!"))
    if template == "sft-chat":  # whose answers begin without the blank that this engine puts there
        assert second.start == before
    else:
        assert second.start == before + answer
        assert len(second.payload) < len(tokenizer.encode("</s>\n\n<human>: and of Italy?\n<bot>:")) + 25


def test_an_interrupted_answer_is_kept_as_far_as_it_came(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    talk = dialogue(engine, tokenizer)
    pieces = talk.ask("hello")
    text = next(pieces).text + next(pieces).text
    pieces.close()
    assert talk.conversation.turns == [Turn("user", "hello"), Turn("assistant", text.strip())]


def test_a_question_that_got_no_answer_is_taken_back(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    talk = dialogue(engine, tokenizer)
    engine.fail = [ServerFault("the server lost a block")]
    with pytest.raises(ServerFault):
        list(talk.ask("hello"))
    with pytest.raises(PromptTooLong):
        list(talk.ask("x" * 5000))
    assert talk.conversation.turns == []
    list(talk.ask("hello"))
    assert len(talk.conversation.turns) == 2


def test_every_answer_has_a_seed_and_retries_another(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    talk = dialogue(engine, tokenizer, seed=7)
    assert talk.retry() is None
    list(talk.ask("hello"))
    list(talk.retry() or [])
    talk.set(seed=None)
    list(talk.retry() or [])
    seeds = [step.settings.seed for step in engine.steps if step.settings]
    assert seeds[:2] == [7, 8]
    assert len(set(seeds)) == 3
    assert len(talk.conversation.turns) == 2


def test_settings_change_whole_or_not_at_all(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    talk = dialogue(engine, tokenizer)
    with pytest.raises(InvalidSetting, match="temperature"):
        talk.set(temperature=3, top_p=0.5)
    with pytest.raises(InvalidSetting, match="no such setting"):
        talk.set(heat=1)
    assert talk.options == GREEDY


def test_stops_are_the_templates_and_the_users(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    talk = dialogue(engine, tokenizer, stop=["thank"], stop_token_ids=[9])
    assert "".join(piece.text for piece in talk.ask("hello")) == " fine, "
    settings = engine.steps[0].settings
    assert settings is not None
    assert settings.stop_sequences == ("<human>", "thank")
    assert settings.stop_token_ids == (toy.END, 9)
