"""The engine and its peers behind one question: how long after the request did each token come?"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from corolla.engine.engine import Engine, EngineConfig
from corolla.messages import Close, Gap, Reply, Token
from corolla.models.span import SpanModel
from corolla.types import Failed, GenerationSettings, Step


@dataclass(slots=True)
class Answer:
    """One session's tokens and when each came, in seconds from the request."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token to the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Runner(Protocol):
    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer: ...


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of all sessions together, while all of them decode: no prefill, nobody finished yet."""
    began, ended = max(answer.times[0] for answer in answers), min(answer.times[-1] for answer in answers)
    return sum(began < moment <= ended for answer in answers for moment in answer.times) / (ended - began)


class Corolla:
    """The engine, driven on this thread; no session outlives a call unless it is named. It guesses no tokens, for its peers do not."""

    def __init__(self, model: SpanModel, *, cache_tokens: int = 8192, batch_invariant: bool = False) -> None:
        self.model = model
        self.engine = Engine(model, EngineConfig(cache_tokens=cache_tokens, batch_invariant=batch_invariant, drafts=0))
        self._answers: dict[str, Answer] = {}
        self._running: dict[str, tuple[float, Step]] = {}
        self._sent = 0
        self._refusal: Failed | Gap | None = None

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        return self.answers([prompt], new_tokens)[0]

    def answers(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """All prompts at once, a session each."""
        sessions = [f"{self._sent}-{index}" for index in range(len(prompts))]
        answers = [self.send(session, 0, prompt, new_tokens) for session, prompt in zip(sessions, prompts, strict=True)]
        self.run()
        self.close(*sessions)
        return answers

    def send(self, session: str, start: int, token_ids: Sequence[int], new_tokens: int) -> Answer:
        """Begin an answer; its `Answer` fills while `run` runs."""
        self._sent += 1
        step = Step(session, start, tuple(token_ids), self._sent, GenerationSettings(max_tokens_to_generate=new_tokens))
        answer = self._answers[session] = Answer()
        self._running[session] = time.perf_counter(), step
        self.engine.receive(step, self._deliver)
        return answer

    def run(self, until: Answer | None = None) -> None:
        """Until every answer has ended, or until the first token of one."""
        while self._running and not (until is not None and until.times):
            self.engine.run_once()
            if isinstance(self._refusal, Failed):
                raise self._refusal.error
            if isinstance(self._refusal, Gap):
                raise SystemExit(f"the engine evicted a session of this benchmark at position {self._refusal.have}: raise cache_tokens")

    def close(self, *sessions: str) -> None:
        for session in sessions:
            self.engine.receive(Close(session), self._deliver)
            self._running.pop(session, None)
            self._answers.pop(session, None)
        self.engine.run_once()

    def _deliver(self, reply: Reply) -> None:
        now = time.perf_counter()
        if reply.session not in self._running:
            return  # what was under way when the session was closed
        began, step = self._running[reply.session]
        if isinstance(reply, (Failed, Gap)):
            self._refusal = reply  # raised by `run`: nothing may be raised here
        if isinstance(reply, Token) and reply.generation == step.generation:
            answer = self._answers[reply.session]
            answer.token_ids.append(reply.token_id)
            answer.times.append(now - began)
            if reply.finish is not None:
                del self._running[reply.session]


class Transformers:
    """`model.generate` of stock transformers, greedy."""

    def __init__(self, directory: Path, *, dtype: str = "bfloat16", device: str = "cpu") -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        answer = Answer()
        began = time.perf_counter()
        clock = _Clock(answer, began)
        ids = torch.tensor([list(prompt)], device=self.model.device)
        self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=clock)
        return answer


class _Clock:
    """A streamer of transformers that notes when tokens come; what it is given first is the prompt."""

    def __init__(self, answer: Answer, began: float) -> None:
        self._answer, self._began, self._prompt_came = answer, began, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_came:
            self._answer.times.append(time.perf_counter() - self._began)
            self._answer.token_ids.append(int(value))
        self._prompt_came = True

    def end(self) -> None:
        pass


class LlamaCpp:
    """llama-cpp-python under an interpreter that has it; see llama_peer.py."""

    def __init__(self, python: Path, gguf: Path, threads: int, context: int) -> None:
        script = Path(__file__).with_name("llama_peer.py")
        self._python = python
        command = [str(python), str(script), str(gguf), str(threads), str(context)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["version"]

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return Answer(**self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._python} ended with code {self._process.wait()}: can it import llama_cpp?")
        return json.loads(line)


def median_gap_ms(answer: Answer) -> float:
    return statistics.median(answer.gaps) * 1e3
