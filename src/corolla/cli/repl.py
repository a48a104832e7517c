"""The conversation in a terminal: questions, answers as they are written, and commands."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.text import Text

from corolla.chat.dialogue import Dialogue
from corolla.cli.display import AnswerDisplay
from corolla.client.completion import CompletionDelta
from corolla.errors import CorollaError, InvalidSetting

try:
    import readline  # gives `input` its editing keys and history
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

_PROMPT = "\001\x1b[1;36m\002>\001\x1b[0m\002 "  # readline must know which bytes take no room


class Repl:
    """Reads questions and commands until the user leaves."""

    def __init__(self, dialogue: Dialogue, model: str) -> None:
        self._dialogue = dialogue
        self._model = model
        self._console = Console(highlight=False, markup=False)
        self._commands: dict[str, tuple[str, str, Callable[[str], bool | None]]] = {
            "/help": ("", "this list", self._help),
            "/reset": ("", "forget the conversation", self._reset),
            "/system": ("[TEXT]", "show or change what the model is told first (- for nothing)", self._system),
            "/retry": ("", "another answer to the last question", self._retry),
            "/undo": ("", "take back the last question and its answer", self._undo),
            "/save": ("FILE", "write the conversation to a file", self._save),
            "/load": ("FILE", "go on with a conversation from a file", self._load),
            "/set": ("[NAME VALUE]", "show or change a setting, as in /set temperature 0.7", self._set),
            "/exit": ("", "leave (or Ctrl-D)", lambda _: True),
        }

    def run(self) -> None:
        """Until /exit, Ctrl-D, or Ctrl-C twice at the empty prompt."""
        template = self._dialogue.conversation.template
        self._say(f"{self._model}, template {template.name}. /help for help, Ctrl-C stops an answer, Ctrl-D leaves.")
        interrupted = False
        while True:
            try:
                line = _type().strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                if interrupted:
                    return
                self._say("Ctrl-C again, or Ctrl-D, leaves.")
                interrupted = True
                continue
            interrupted = False
            if line and self._do(line):
                return

    def _do(self, line: str) -> bool | None:
        """One question or command; true to leave."""
        try:
            if not line.startswith("/"):
                self._show(self._dialogue.ask(line))
                return None
            name, _, argument = line.partition(" ")
            if name not in self._commands:
                self._say(f"There is no {name}; /help lists what there is.")
                return None
            return self._commands[name][2](argument.strip())
        except CorollaError as error:
            self._console.print(Text(f"error: {error}", style="red"))
            return None

    def _show(self, pieces: Generator[CompletionDelta, None, None]) -> None:
        with AnswerDisplay(self._console) as display:
            try:
                for piece in pieces:
                    display.add(piece.text, 0 if piece.token is None else 1)
                ending = ""
            except KeyboardInterrupt:
                ending = "stopped"
                pieces.close()
            result = self._dialogue.result
            if result is not None and result.finish_reason == "length":
                ending = "cut at the limit of tokens"
            display.finish(result, ending)

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def _help(self, argument: str) -> None:
        for name, (operand, about, _) in self._commands.items():
            self._console.print(Text.assemble((f"{name} {operand}".ljust(22), "bold"), about))

    def _reset(self, _: str) -> None:
        self._dialogue.conversation.reset()
        self._say("The conversation begins anew.")

    def _system(self, text: str) -> None:
        conversation = self._dialogue.conversation
        if text:
            conversation.system = "" if text == "-" else text
        self._say(f"system: {conversation.system or '(none)'}")

    def _retry(self, _: str) -> None:
        pieces = self._dialogue.retry()
        if pieces is None:
            self._say("There is no question yet.")
        else:
            self._show(pieces)

    def _undo(self, _: str) -> None:
        question = self._dialogue.conversation.undo()
        self._say("There is nothing to take back." if question is None else f"Taken back: {question}")

    def _save(self, file: str) -> None:
        if not file:
            self._say("Name a file: /save FILE")
            return
        self._dialogue.conversation.save(Path(file).expanduser())
        self._say(f"Saved to {file}.")

    def _load(self, file: str) -> None:
        if not file:
            self._say("Name a file: /load FILE")
            return
        conversation = self._dialogue.conversation
        conversation.load(Path(file).expanduser())
        for turn in conversation.turns:
            self._console.print(Text(f"> {turn.content}" if turn.role == "user" else turn.content, style="dim"))

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if name:
            self._dialogue.set(**{name.replace("-", "_"): _value(name, value.strip())})
        for setting, current in sorted(self._dialogue.options.items()):
            if not name or setting == name.replace("-", "_"):
                self._say(f"{setting} {'(default)' if current is None else json.dumps(current, ensure_ascii=False)}")


def answer_lines(dialogue: Dialogue) -> None:
    """Each line of standard input is a question; the answers alone go to standard output. Blank lines are passed over.

    Raises what `Dialogue.ask` raises.
    """
    for line in sys.stdin:
        if not line.strip():
            continue
        blanks = ""  # those at either end of an answer are no part of it
        began = False
        for piece in dialogue.ask(line.strip()):
            text = blanks + piece.text if began else piece.text.lstrip()
            began = began or bool(text)
            blanks = text[len(text.rstrip()) :]
            print(text.rstrip(), end="", flush=True)
        print(flush=True)


def _value(name: str, text: str) -> object:
    """A setting's value as it is typed: JSON where it is JSON, `none` for the default, else a string."""
    if not text:
        raise InvalidSetting(name, f"give a value, as in /set {name} VALUE")
    if text.lower() in ("none", "default"):
        return None
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _type() -> str:
    """A line from the keyboard; empty if Ctrl-C discarded what was typed of it.

    Raises `KeyboardInterrupt` for Ctrl-C at the empty prompt, `EOFError` for Ctrl-D there.
    """
    typed = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal typed
        typed = readline is not None and bool(readline.get_line_buffer())  # readline empties it before `input` raises
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return input(_PROMPT if readline is not None else "> ")
    except KeyboardInterrupt:
        if not typed:
            raise
        print()
        return ""
    finally:
        signal.signal(signal.SIGINT, before)
