"""Parts of swarm.py: BLOOM with random weights beside Petals, stored as the published ones are and computed in float32, two servers."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from runners import decode_rate
from swarm_bench import CORES, PROMPT, Bench, plural
from swarm_servers import CorollaSwarm, PetalsSwarm, Processes, even_spans


@dataclass(frozen=True, slots=True)
class Shape:
    """A BLOOM, and what Corolla is held against: (reach, aim) for one session and for 8."""

    name: str
    hidden: int
    blocks: int
    heads: int
    new_tokens: int
    petals_threads: tuple[int, ...]  # of a server: the settings that may be Petals' better one
    single: tuple[float, float]
    together: tuple[float, float]


SHAPES = {
    "petals560": Shape("BLOOM of the 560m's shape", 1024, 24, 16, 24, tuple(sorted({1, CORES})), single=(2.0, 3.0), together=(5.0, 8.0)),
    # Two processes that use both cores hurt one another: at one thread each Petals' 8 sessions here are over 5 times as quick.
    "petals256": Shape("BLOOM of hidden 256, 8 layers", 256, 8, 8, 48, (1,), single=(4.0, 8.0), together=(6.0, 10.0)),
}
VOCABULARY = 32_000
TOGETHER = 8  # sessions


def make_bloom(directory: Path, shape: Shape, stored: str) -> None:
    """A checkpoint with the published models' tensor names, which Petals expects."""
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        n_layer=shape.blocks,
        n_head=shape.heads,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    transformers.BloomForCausalLM(config).transformer.to(getattr(torch, stored)).save_pretrained(directory)


def stock_answers(directory: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """What stock transformers answers, greedily, in float32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts)
    answers = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return cast(list[list[int]], answers[:, ids.shape[1] :].tolist())


class BesidePetals:
    """One shape, served by a swarm of either system; Petals once for each number of threads. Every cell is one round of one of them."""

    def __init__(self, bench: Bench, shape: Shape, processes: Processes) -> None:
        self._bench, self._shape = bench, shape
        options = bench.options
        directory = processes.new_path("model")
        make_bloom(directory, shape, options.petals_stored)
        self._first = [bench.prompt(PROMPT, VOCABULARY) for _ in range(TOGETHER)]
        self._expected = stock_answers(directory, self._first, shape.new_tokens)
        spans = even_spans(shape.blocks, 2)
        corolla = CorollaSwarm(processes, directory, spans, threads=options.threads, dtype="float32")
        self._client = corolla.client()
        self.petals: dict[str, PetalsSwarm] = {}
        if options.petals_python is None:
            print("  without --petals-python the rows of Petals, and the ratios to it, are left out", file=sys.stderr)
        else:
            for threads in options.petals_threads or shape.petals_threads:
                name = f"Petals, {plural(threads, 'thread')}"
                self.petals[name] = PetalsSwarm(processes, options.petals_python, directory, spans, threads=threads)
        self.corolla = f"Corolla, {plural(options.threads, 'thread')}"

    def cells(self) -> dict[str, Callable[[int], Mapping[str, float]]]:
        return {
            self.label(name, sessions): functools.partial(self._measure, name, sessions)
            for sessions in (1, TOGETHER)
            for name in (self.corolla, *self.petals)
        }

    def label(self, name: str, sessions: int) -> str:
        return f"{self._shape.name}, {plural(sessions, 'session')}, {name}"

    def _measure(self, name: str, sessions: int, number: int) -> Mapping[str, float]:
        prompts = self._first if number < 0 else [self._bench.prompt(PROMPT, VOCABULARY) for _ in range(TOGETHER)]
        if name == self.corolla:
            answers = self._client.answers(prompts[:sessions], self._shape.new_tokens)
        else:
            answers = self.petals[name].answers(prompts[:sessions], self._shape.new_tokens)
        if number < 0 and [answer.token_ids for answer in answers] != self._expected[:sessions]:
            raise SystemExit(f"{self.label(name, sessions)}: not the answers of stock transformers, so its speed does not count")
        return {self.label(name, sessions): decode_rate(answers)}


def petals(shape: Shape, bench: Bench) -> None:
    with bench.processes() as processes:
        beside = BesidePetals(bench, shape, processes)
        figures = bench.rounds(beside.cells())
    for name, values in figures.items():
        bench.table.add(name, "tokens/s", values)
    for name, swarm in beside.petals.items():
        if swarm.hung:
            bench.table.add(f"{shape.name}, {name}: asked again because a session hung", "times", [swarm.hung])
    for sessions, (reach, aim) in ((1, shape.single), (TOGETHER, shape.together)):
        if beside.petals:
            theirs = max((figures[beside.label(name, sessions)] for name in beside.petals), key=statistics.median)
            name = f"{shape.name}, {plural(sessions, 'session')}: Corolla / Petals at its better setting"
            bench.table.ratio(name, "x", figures[beside.label(beside.corolla, sessions)], theirs, reach=reach, aim=aim)
