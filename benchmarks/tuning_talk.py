"""Parts of tuning.py: who talks through the servers that others train through, and by which way."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from corolla.models.catalog import resolve
from runners import Answer, decode_rate, median_gap_ms
from swarm_servers import Client, CorollaSwarm, Processes, even_spans
from tuning_bench import Bench, layers

BEAMS = 4
PROMPT = 64  # tokens


def chats(bench: Bench) -> None:
    """A chat's time per token alone, and while one or two train through the same servers without a pause."""
    options = bench.options
    random = Random(0)
    work = {"steps": options.beside_steps, "batch": options.batch, "length": options.length}
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, Processes(Path(folder)) as processes:
        swarm = bench.corolla(processes, "float32")
        chat, tuning = swarm.client(), [bench.client(processes, "corolla", swarm.address, "float32") for _ in range(2)]

        def gap() -> float:
            return median_gap_ms(chat.answer([random.randrange(5, 1000) for _ in range(16)], options.chat_tokens))

        def measure(number: int) -> Mapping[str, float]:
            if number < 0:
                gap()
                for client in tuning:
                    client.send(steps=1, batch=2, length=16)
                    client.read()
                return {}
            figures = {"alone": bench.rate(bench.ask(tuning[0])), "quiet": gap()}
            for together in (1, 2):
                for client in tuning[:together]:
                    client.send(**work)
                figures[f"beside {together}"] = gap()
                figures[f"slowed {together}"] = sum(bench.rate(client.read()) for client in tuning[:together])
            return figures

        figures = bench.rounds({"chats": measure})
    bench.table.add("a chat's time per token, alone", "ms", figures["quiet"])
    for together, who in ((1, "one who trains"), (2, "two who train")):
        bench.table.add(f"the same beside {who}", "ms", figures[f"beside {together}"])
        bench.table.ratio(f"a chat beside {who} / alone", "x", figures[f"beside {together}"], figures["quiet"])
        bench.table.ratio(f"training of {who}, partly beside the chat / of one alone", "x", figures[f"slowed {together}"], figures["alone"])


def session(bench: Bench) -> None:
    """Greedy tokens a second of one session of the default model, by both ways through the same servers, and of beams."""
    dtype, directory = bench.options.session_dtype, resolve(bench.options.model)
    name = f"{bench.options.model}, {dtype}"
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, Processes(Path(folder)) as processes:
        figures = bench.rounds({name: BothWays(bench, processes, directory, dtype).measure})
    bench.table.add(f"{name}: the tokens' way", "tokens/s", figures["tokens"])
    bench.table.add(f"{name}: generate(session=...)", "tokens/s", figures["hidden"])
    ratio = functools.partial(bench.table.ratio, unit="x", reach=0.7, aim=0.9)
    ratio(f"{name}: generate(session=...) / the tokens' way", ours=figures["hidden"], theirs=figures["tokens"])
    bench.table.add(f"{name}: {BEAMS} beams, prompt of {PROMPT} included", "tokens/s", figures["beams"])
    name = f"{name}: {BEAMS} beams / transformers' in one process"
    bench.table.ratio(name, "x", figures["beams"], figures["stock beams"])


class BothWays:
    """Two servers of a model, a client of each way, and transformers' own model."""

    def __init__(self, bench: Bench, processes: Processes, directory: Path, dtype: str) -> None:
        options = bench.options
        swarm = CorollaSwarm(processes, directory, even_spans(layers(directory), 2), threads=options.threads, dtype=dtype)
        self._tokens = swarm.client()
        self._hidden = bench.client(processes, "corolla", swarm.address, dtype, directory=directory)
        self._stock = bench.client(processes, "peft", dtype, threads=options.all_threads, directory=directory)
        self._exact = dtype == "float32"
        self._new_tokens: int = options.session_tokens
        self._random = Random(0)

    def measure(self, _number: int) -> Mapping[str, float]:
        prompt = [self._random.randrange(5, 1000) for _ in range(PROMPT)]
        tokens, hidden = self._tokens.answer(prompt, self._new_tokens), self._generate(self._hidden, prompt, 1)
        beams, stock = self._generate(self._hidden, prompt, BEAMS), self._generate(self._stock, prompt, BEAMS)
        if self._exact and (tokens.token_ids != hidden.token_ids or beams.token_ids != stock.token_ids):
            raise SystemExit("the answers differ, so their speed does not count")
        return {
            "tokens": decode_rate([tokens]),
            "hidden": decode_rate([hidden]),
            "beams": self._new_tokens / beams.times[-1],
            "stock beams": self._new_tokens / stock.times[-1],
        }

    def _generate(self, client: Client, prompt: Sequence[int], beams: int) -> Answer:
        client.send(prompt=prompt, new_tokens=self._new_tokens, beams=beams)
        return Answer(**client.read())
