"""Models' own chat templates, rendered in processes beside this one, with bounds to the time, memory and text that they may take.

A template is a program that came with a model. In a process of its own it can loop, multiply strings and raise what it
likes: the request that needed it ends in a sentence, and nothing else notices. An honest one takes 0.2 ms.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from corolla.barrier import barrier
from corolla.client.tokenizer import TextTokenizer
from corolla.errors import CallerError, CheckpointError, CorollaError

if TYPE_CHECKING:
    import jinja2

_START = 60.0  # seconds for a process to begin, on a machine that is busy
_MOST_SAID = 500  # characters of an error
_MOST_IDLE = 4  # processes that wait for the next text
_COMMAND = (sys.executable, "-c", "from corolla.chat.rendering import serve; serve()")
_PASSED = ("PATH", "HOME", "TZ", "LANG", "LC_ALL", "LC_TIME")  # no secret is among them


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderingLimits:
    seconds: float = 5.0
    characters: int = 2**24  # of the text that comes of it
    memory: int = 2**30  # bytes of address space, Python's own included


class OwnTemplate:
    """The chat template of a tokenizer. Raises `CheckpointError` where there is none."""

    def __init__(self, tokenizer: TextTokenizer, limits: RenderingLimits | None = None) -> None:
        if tokenizer.chat_template is None:
            raise CheckpointError(f"{tokenizer.directory} has no chat template: choose one with --template")
        self._text = tokenizer.chat_template
        self._tokens = tokenizer.special_tokens
        self._directory = tokenizer.directory
        self._limits = limits or RenderingLimits()

    def check(self) -> None:
        """Raises `CheckpointError` where it is damaged."""
        self._ask(None)

    def render(self, system: str, turns: Sequence[tuple[str, str]]) -> str:
        """The text of a conversation, (role, content) by turns, up to where the next answer begins.

        Raises `CallerError` when the template refuses it, fails or takes too much, `CheckpointError` where it is damaged.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": role, "content": content} for role, content in turns]
        return self._ask({"messages": messages, "add_generation_prompt": True, **self._tokens})

    def _ask(self, variables: dict[str, Any] | None) -> str:
        line = json.dumps([self._text, variables, self._limits.characters]).encode() + b"\n"
        process = _take(self._limits.memory)
        answer = process.ask(line, self._limits.seconds)
        if answer is None:
            raise CallerError(
                f"the chat template in {self._directory} took more than {self._limits.seconds:g} s or {self._limits.memory >> 20} MiB "
                "over this conversation: choose another with --template"
            )
        _give_back(process)
        kind, text = json.loads(answer)
        if kind == "damaged":
            raise CheckpointError(f"the chat template in {self._directory} is damaged ({text}): choose one with --template")
        if kind != "text":
            raise CallerError(f"the chat template in {self._directory} {kind} this conversation ({text}): choose another with --template")
        return str(text)


class _Process:
    """A Python that renders what it is asked to, one text at a time."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the one who asks
            env={name: os.environ[name] for name in _PASSED if name in os.environ}
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if self.ask(b"%d\n" % memory, _START) is None:
            raise CorollaError("the process that renders chat templates did not begin: is this machine out of memory?")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: bytes, seconds: float) -> bytes | None:
        """Its answer. None where it gave none in that time, or died of it; then it is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        answer = b""
        try:
            with suppress(OSError):
                self._process.stdin.write(line)
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return answer
        self.close()
        return None

    def close(self) -> None:
        self._process.kill()
        with suppress(OSError):  # what it did not read
            self._process.communicate()


_idle: list[_Process] = []  # a list's `pop` and `append` are atomic


def _take(memory: int) -> _Process:
    while True:
        try:
            process = _idle.pop()
        except IndexError:
            return _Process(memory)
        if process.alive and process.memory == memory:
            return process
        process.close()


def _give_back(process: _Process) -> None:
    if len(_idle) < _MOST_IDLE:
        _idle.append(process)
    else:
        process.close()


@atexit.register
def _close_all() -> None:
    while _idle:
        _idle.pop().close()


os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's


def serve() -> None:
    """The process's side: a line with the memory that it may take, then texts until nobody asks any more."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines, answers = sys.stdin.buffer, sys.stdout.buffer
    memory = int(lines.readline())
    environment()  # what it imports is there before the memory is bounded
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answers.write(b"ready\n")
    answers.flush()
    for line in lines:
        answers.write(json.dumps(_answered(line)).encode() + b"\n")
        answers.flush()


def _answered(line: bytes) -> list[str]:
    said: list[str] = []
    with barrier("a chat template", lambda error: said.extend(["fails at", f"{type(error).__name__}: {error}"[:_MOST_SAID]])):
        said += _answer(*json.loads(line))
    return said


def _answer(template: str, variables: dict[str, Any] | None, most: int) -> list[str]:
    import jinja2

    try:
        compiled = _compiled(template)
    except jinja2.TemplateError as error:
        return ["damaged", str(error)[:_MOST_SAID]]
    if variables is None:
        return ["text", ""]
    try:
        text = compiled.render(**variables)
    except jinja2.TemplateError as error:
        return ["refuses", str(error)[:_MOST_SAID]]
    return ["text", text] if len(text) <= most else ["refuses", f"{len(text)} characters came of it, and {most} may"]


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def environment() -> jinja2.Environment:
    """Jinja as models' templates expect it: as transformers sets it up."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks what a model is trained on; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 (the library's interface)

        def parse(self, parser: Any) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment
