from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import toy

from corolla.chat.conversation import Conversation, read_few_shot
from corolla.chat.templates import TEMPLATES, Turn
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import CallerError, EmptyPrompt, PromptTooLong, StorageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(toy.make_directory(tmp_path_factory.mktemp("toy"), toy.byte_level()))


@pytest.fixture
def conversation(tokenizer: TextTokenizer) -> Conversation:
    return Conversation(
        tokenizer, TEMPLATES["plain"], context_length=1000, system="Be kind.", few_shot=[Turn("user", "1"), Turn("assistant", "2")]
    )


def text(conversation: Conversation, room: int = 100) -> str:
    return conversation.tokenizer.decode(conversation.prompt(room))


def test_turns_follow_system_prompt_and_examples(conversation: Conversation) -> None:
    conversation.ask("hello")
    assert text(conversation) == "Be kind.\n\nUser: 1\nAssistant: 2\nUser: hello\nAssistant:"
    conversation.answer(" fine\n")
    assert conversation.turns == [Turn("user", "hello"), Turn("assistant", "fine")]


def test_the_oldest_turns_go_first_and_whole(conversation: Conversation) -> None:
    for number in range(20):
        conversation.ask(f"question {number}")
        conversation.answer(f"answer {number}")
    conversation.ask("last")
    everything = len(conversation.prompt(0))
    shortened = text(conversation, conversation.context_length - everything + 1)
    assert shortened.startswith("Be kind.\n\nUser: 1\nAssistant: 2\nUser: question 1\nAssistant: answer 1\n")
    assert len(conversation.turns) == 41
    bare = text(conversation, conversation.context_length - everything // 5)
    assert bare.endswith("User: last\nAssistant:")


def test_a_question_that_does_not_fit_alone(conversation: Conversation) -> None:
    conversation.ask("hello")
    conversation.answer("fine")
    conversation.ask("x" * 2000)
    with pytest.raises(PromptTooLong) as error:
        conversation.prompt(100)
    assert error.value.limit == 900


def test_an_empty_question(conversation: Conversation) -> None:
    with pytest.raises(EmptyPrompt):
        conversation.ask(" \n")


def test_undo_retry_reset(conversation: Conversation) -> None:
    assert conversation.undo() is None
    assert not conversation.retry()
    for question in ("a", "b"):
        conversation.ask(question)
        conversation.answer("yes")
    assert conversation.retry()
    assert conversation.turns[-1] == Turn("user", "b")
    assert conversation.undo() == "b"
    assert conversation.turns == [Turn("user", "a"), Turn("assistant", "yes")]
    conversation.reset()
    assert conversation.turns == []


def test_a_saved_conversation_is_found_again(conversation: Conversation, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    conversation.ask("héllo")
    conversation.answer("fine")
    conversation.save(tmp_path / "talk.json")
    another = Conversation(tokenizer, TEMPLATES["petals"], context_length=1000)
    another.load(tmp_path / "talk.json")
    another.ask("more")
    conversation.ask("more")
    assert another.prompt(0) == conversation.prompt(0)
    assert os.listdir(tmp_path) == ["talk.json"]


def test_a_save_that_fails_leaves_the_file_before(conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "talk.json"
    conversation.save(file)
    before = file.read_text()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match=r"talk\.json cannot be written: No space left"):
        conversation.save(file)
    assert file.read_text() == before
    assert os.listdir(tmp_path) == ["talk.json"]


def test_saving_to_nowhere(conversation: Conversation, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        conversation.save(tmp_path / "missing" / "talk.json")


GOOD = {"template": "plain", "system": "", "few_shot": [], "turns": []}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        *(
            json.dumps({**GOOD, key: value})
            for key, value in {"turns": [{"role": "x"}], "few_shot": 3, "template": "no", "system": 1}.items()
        ),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(conversation: Conversation, tmp_path: Path, content: str) -> None:
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(CallerError):
        conversation.load(tmp_path / "talk.json")
    assert (conversation.template.name, conversation.system) == ("plain", "Be kind.")


def test_examples_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "shots.json"
    entries = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    file.write_text(json.dumps(entries))
    assert read_few_shot(file) == [Turn("user", "1"), Turn("assistant", "2")]
    for bad in (entries[:1], entries[::-1], {}):
        file.write_text(json.dumps(bad))
        with pytest.raises(CallerError, match=r"shots\.json"):
            read_few_shot(file)
    with pytest.raises(CallerError, match="cannot be read"):
        read_few_shot(tmp_path / "none.json")
