from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from typer.testing import CliRunner

from corolla.chat.conversation import Conversation
from corolla.chat.dialogue import Dialogue
from corolla.chat.templates import TEMPLATES, Turn
from corolla.cli.main import app
from corolla.cli.repl import Repl
from corolla.client.session import Session
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import ServerFault
from corolla.models.checkpoint import read_config
from corolla.models.families import architecture
from corolla.models.prompts import SoftPrompt, save_prompt
from tests.models import lora, tiny

Run = Callable[..., Any]
Talk = Callable[..., str]


def test_each_line_is_a_turn_and_answers_alone_come_out(corolla: Run, model: Any) -> None:
    model.answers = [" Paris.\n", "\nRome  is\n\nit.\n"]
    result = corolla("chat", "toy", stdin="What is the capital of France?\n\n  And of Italy?  \n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Paris.\nRome  is\n\nit.\n", "")
    asked = model.tokenizer.decode([*model.engine.steps[0].payload])
    assert asked == "<human>: What is the capital of France?\n<bot>:"
    assert model.engine.steps[1].start > len(asked.split())


def test_defaults_are_for_talking(corolla: Run, model: Any) -> None:
    corolla("chat", stdin="hello\n")
    assert model.opened[0][0] == "smollm2"
    settings = model.engine.steps[0].settings
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.7, 0.9)
    assert (settings.stop_sequences, settings.stop_token_ids) == (("<human>",), (toy.END,))


def test_options(corolla: Run, model: Any, tmp_path: Path) -> None:
    shots = tmp_path / "shots.json"
    shots.write_text(json.dumps([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]))
    corolla("chat", "toy", "--template", "plain", "--system", "Be kind.", "--few-shot", str(shots), "--temperature", "0", stdin="hello\n")
    step = model.engine.steps[0]
    assert model.tokenizer.decode([*step.payload]) == "Be kind.\n\nUser: 1\nAssistant: 2\nUser: hello\nAssistant:"
    assert not step.settings.do_sample


@pytest.mark.parametrize("arguments", [["--template", "alpaca"], ["--top-p", "0"], ["--few-shot", "none.json"]])
def test_bad_options_are_named_before_the_model_is_opened(corolla: Run, model: Any, arguments: list[str]) -> None:
    result = corolla("chat", "toy", *arguments, stdin="hello\n")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert model.opened == []


def test_a_question_beyond_the_context(corolla: Run) -> None:
    result = corolla("chat", "toy", stdin="x " * 600 + "\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the context holds 250" in result.stderr


@pytest.fixture
def dialogue(model: Any) -> Iterator[Dialogue]:
    conversation = Conversation(model.tokenizer, TEMPLATES["plain"], context_length=500)
    with Session(model.engine.transport, "fake") as session:
        yield Dialogue(conversation, session, {"temperature": 0.7, "max_new_tokens": 20})


@pytest.fixture
def talk(dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """What the terminal shows for some typed lines; an exception in their place is raised by the keyboard."""

    def talk(*lines: str | type[BaseException]) -> str:
        typed = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        Repl(dialogue, "toy").run()
        assert next(typed, None) is None
        return capsys.readouterr().out

    return talk


def test_a_conversation(talk: Talk, dialogue: Dialogue) -> None:
    shown = talk("hello", "", "and you?", "/exit")
    assert shown.count("fine, thank you!") == 2
    assert "tokens/s" in shown
    assert [turn.content for turn in dialogue.conversation.turns] == ["hello", "fine, thank you!", "and you?", "fine, thank you!"]


def test_commands_on_the_history(talk: Talk, dialogue: Dialogue) -> None:
    assert "There is no question yet." in talk("/retry")
    assert "nothing to take back" in talk("/undo")
    assert "Taken back: b" in talk("a", "b", "/undo")
    assert dialogue.conversation.turns == [Turn("user", "a"), Turn("assistant", "fine, thank you!")]
    assert "fine, thank you!" in talk("/retry")
    assert len(dialogue.conversation.turns) == 2
    talk("/system Be kind.", "/reset")
    assert dialogue.conversation.turns == []
    assert "system: Be kind." in talk("/system")
    assert "system: (none)" in talk("/system -")


def test_settings(talk: Talk, dialogue: Dialogue) -> None:
    assert "temperature 0.2" in talk("/set temperature 0.2")
    talk("/set top-k 5", '/set stop ["a", "b"]', "/set do_sample true", "/set seed 3", "/set seed none")
    assert dialogue.options["stop"] == ("a", "b")
    assert dialogue.options["top_k"] == 5
    assert "max_new_tokens 20" in talk("/set")
    for wrong in ("/set temperature 7", "/set temperature warm", "/set heat 1", "/set temperature"):
        assert "error: " in talk(wrong)
    assert dialogue.options["temperature"] == 0.2


def test_help_and_unknown_commands(talk: Talk) -> None:
    shown = talk("/help", "/sing")
    commands = "/help /reset /system /retry /undo /save /load /set /exit"
    assert all(command in shown for command in commands.split())
    assert "There is no /sing" in shown


def test_save_and_load(talk: Talk, dialogue: Dialogue, tmp_path: Path) -> None:
    shown = talk("hello", f"/save {tmp_path / 'talk.json'}", "/reset", f"/load {tmp_path / 'talk.json'}", "/save", "/load /nowhere")
    assert "> hello" in shown
    assert "Name a file" in shown
    assert "error: /nowhere cannot be read" in shown
    assert len(dialogue.conversation.turns) == 2


def test_an_error_ends_the_answer_and_not_the_conversation(talk: Talk, model: Any, dialogue: Dialogue) -> None:
    model.engine.fail = [ServerFault("the server lost a block")]
    shown = talk("hello", "hello")
    assert "error: the server lost a block" in shown
    assert "fine, thank you!" in shown
    assert len(dialogue.conversation.turns) == 2


def test_an_interruption_stops_the_answer_only(talk: Talk, dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, wait = itertools.count(), dialogue.session._wait

    def interrupted(deadline: float) -> Any:
        if next(waits) == 2:
            raise KeyboardInterrupt
        return wait(deadline)

    monkeypatch.setattr(dialogue.session, "_wait", interrupted)
    shown = talk("hello", "and you?")
    assert "2 tokens" in shown
    assert "stopped" in shown
    question, answer, *more = dialogue.conversation.turns
    assert question.content == "hello"
    assert "fine, thank you!".startswith(answer.content)
    assert more[1].content == "fine, thank you!"


def test_two_interruptions_at_the_prompt_leave(talk: Talk) -> None:
    shown = talk(KeyboardInterrupt, "hello", KeyboardInterrupt, KeyboardInterrupt)
    assert shown.count("Ctrl-C again") == 2


def test_the_default_model_answers_in_context(smollm2: Path) -> None:
    """In float32: bfloat16 makes a tie of the first token, which processors decide differently."""
    code = "from corolla.cli.main import app; app()"
    command = [sys.executable, "-c", code, "chat", str(smollm2), "--temperature", "0", "--threads", "1", "--dtype", "float32"]
    questions = "What is the capital of France?\nAnd of Italy?\n"
    first, second = subprocess.run(command, input=questions, check=True, capture_output=True, text=True, timeout=300).stdout.splitlines()
    assert "Paris" in first
    assert "Rome" in second


def test_a_soft_prompt_stands_in_front_of_the_conversation(corolla: Run, model: Any, tmp_path: Path) -> None:
    arch = architecture(read_config(model.directory))
    save_prompt(tmp_path / "tuned", SoftPrompt(torch.ones(4, arch.hidden)), arch)
    result = corolla("chat", "toy", "--prompt", str(tmp_path / "tuned"), "--template", "plain", stdin="hello\nagain\n")
    assert (result.exit_code, result.stderr) == (0, "")
    first, second = model.engine.steps
    assert (first.start, first.prompt.tokens, first.prompt.deep) == (0, 4, False)
    assert list(first.payload[:4]) == [0] * 4
    assert model.tokenizer.decode([*first.payload[4:]]) == "User: hello\nAssistant:"
    assert second.start > 4


def test_an_adapter_is_given_to_the_model(tmp_path: Path) -> None:
    toy.make_directory(tmp_path / "base", toy.byte_level())
    base = tiny.save("llama", tmp_path / "base", vocab_size=400)
    adapter = lora.save(base, tmp_path / "adapter")

    def run(*arguments: str) -> str:
        options = ["--dtype", "float32", "--max-new-tokens", "6", "--temperature", "0"]
        done = CliRunner().invoke(app, [arguments[0], str(base), *options, *arguments[1:]], input="hello\n")
        assert (done.exit_code, done.exception) == (0, None)
        return done.stdout

    tokens = TextTokenizer(base).encode("hello", opening=True)
    for more, reference in ((("--adapter", str(adapter)), adapter), ((), None)):
        answer = json.loads(run("generate", "--prompt", "hello", "--json", *more))["token_ids"]
        assert answer == lora.Adapted(base, reference).greedy(tokens, len(answer))
    assert run("chat", "--adapter", str(adapter)) != run("chat")


@pytest.mark.parametrize("command", [["chat", "toy"], ["generate", "toy", "--prompt", "a"]])
def test_an_adapter_that_is_not_there_is_one_line(corolla: Run, tmp_path: Path, command: list[str]) -> None:
    for given, sentence in ((str(tmp_path), "adapter_config.json is missing"), ("poet", "there is no directory 'poet'")):
        result = corolla(*command, "--adapter", given, stdin="hello\n")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert sentence in result.stderr


@pytest.mark.parametrize("arguments", [["chat", "toy", "--prompt"], ["generate", "toy", "--prompt", "a", "--soft-prompt"]])
def test_a_directory_without_a_soft_prompt_is_one_line(corolla: Run, tmp_path: Path, arguments: list[str]) -> None:
    result = corolla(*arguments, str(tmp_path), stdin="hello\n")
    assert result.exit_code != 0
    assert "adapter_config.json is missing" in result.stderr
