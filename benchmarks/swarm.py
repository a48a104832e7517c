"""The swarm on one machine, real processes over real hivemind: beside Petals, beside the engine in one process, and as it grows.

    python benchmarks/swarm.py [--petals-python PYTHON] [--only overhead recovery ...] [--json FILE]

PYTHON is an interpreter that has Petals (make_petals_peer.sh makes one); without it those rows are left out. Every part
starts its swarms, measures everything once a round in turn, and ends them. Speeds count when the answers are right: those of
random weights are compared with stock transformers, token for token. Clients are processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, cast

import psutil
import torch
import transformers

from common import Table, rounds
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.client.tokenizer import TextTokenizer
from corolla.engine.engine import Engine
from corolla.models import catalog
from corolla.models.span import load_span
from corolla.server.embedded import fast_dtype
from corolla.server.node import SpanServer, SpanServerConfig
from corolla.swarm import frames
from corolla.swarm.network import LocalHub
from corolla.swarm.routing import Hop, Route
from corolla.swarm.wire import StepFrame, TokenFrame, WireMessage
from corolla.types import GenerationSettings, Span
from engine import check_peer
from runners import Corolla, Runner, decode_rate, median_gap_ms
from swarm_servers import COROLLA, CorollaSwarm, PetalsSwarm, Processes, even_spans

PROMPT = 16  # tokens before a decode measurement
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DEFAULT_DTYPE = fast_dtype("cpu")
DTYPES = sorted({DEFAULT_DTYPE, "float32"})


@dataclass(slots=True)
class Bench:
    """What every part needs, and the table that it adds to."""

    options: argparse.Namespace
    folder: Path
    table: Table
    directory: Path  # of the model of every part but Petals'
    random: Random = field(default_factory=lambda: Random(0))

    @property
    def blocks(self) -> int:
        return cast(int, catalog.describe("", self.directory).blocks)

    def prompt(self, count: int, vocabulary: int = 24_000) -> list[int]:
        """Random tokens, new ones every time."""
        return [self.random.randrange(vocabulary // 2, vocabulary) for _ in range(count)]

    def rounds(self, cells: Mapping[str, Callable[[int], Mapping[str, float]]]) -> dict[str, list[float]]:
        """See `common.rounds`; where no terminal shows its progress, lines do."""
        if sys.stderr.isatty():
            return rounds(self.options.rounds, cells)

        def told(name: str, cell: Callable[[int], Mapping[str, float]], number: int) -> Mapping[str, float]:
            figures = cell(number)
            print(f"  {number + 1}/{self.options.rounds} {name}", file=sys.stderr, flush=True)
            return figures

        return rounds(self.options.rounds, {name: functools.partial(told, name, cell) for name, cell in cells.items()})

    @contextlib.contextmanager
    def processes(self) -> Iterator[Processes]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, Processes(Path(folder)) as processes:
            yield processes

    def swarm(self, processes: Processes, servers: int, **options: Any) -> CorollaSwarm:
        return CorollaSwarm(processes, self.directory, even_spans(self.blocks, servers), threads=self.options.threads, **options)

    def check(self, name: str, runner: Runner) -> None:
        check_peer(name, runner, TextTokenizer(self.directory))


# Beside Petals: BLOOM with random weights, stored as the published ones are and computed in float32, two servers.


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
                name = f"Petals, {_plural(threads, 'thread')}"
                self.petals[name] = PetalsSwarm(processes, options.petals_python, directory, spans, threads=threads)
        self.corolla = f"Corolla, {_plural(options.threads, 'thread')}"

    def cells(self) -> dict[str, Callable[[int], Mapping[str, float]]]:
        return {
            self.label(name, sessions): functools.partial(self._measure, name, sessions)
            for sessions in (1, TOGETHER)
            for name in (self.corolla, *self.petals)
        }

    def label(self, name: str, sessions: int) -> str:
        return f"{self._shape.name}, {_plural(sessions, 'session')}, {name}"

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
            name = f"{shape.name}, {_plural(sessions, 'session')}: Corolla / Petals at its better setting"
            bench.table.ratio(name, "x", figures[beside.label(beside.corolla, sessions)], theirs, reach=reach, aim=aim)


# Beside the engine in one process.


def overhead(bench: Bench) -> None:
    new_tokens = 64
    with bench.processes() as processes:
        client = bench.swarm(processes, 3).client()
        bench.check("the swarm", client)
        torch.set_num_threads(bench.options.threads)
        engine = Corolla(load_span(bench.directory, dtype=DEFAULT_DTYPE, weights="packed"))

        def measure(name: str, runner: Runner, _round: int) -> Mapping[str, float]:
            return {name: median_gap_ms(runner.answer(bench.prompt(PROMPT), new_tokens))}

        runners: dict[str, Runner] = {"time per token, engine in one process": engine, "time per token, 3 servers": client}
        figures = bench.rounds({name: functools.partial(measure, name, runner) for name, runner in runners.items()})
    for name, values in figures.items():
        bench.table.add(name, "ms", values)
    one, three = figures.values()
    bench.table.ratio("time per token: 3 servers / engine in one process", "x", three, one, reach=1.25, aim=1.1, at_most=True)


# Distance.

DELAYS = (0.05, 0.1)  # seconds one way; a round trip takes twice that


def delay(bench: Bench) -> None:
    for dtype in DTYPES:
        delay_in(dtype, bench)


def delay_in(dtype: str, bench: Bench) -> None:
    """Every connection goes through a proxy that holds each chunk in each direction."""
    new_tokens = 24
    with bench.processes() as processes:
        swarm = bench.swarm(processes, 3, dtype=dtype, proxied=True)
        client = swarm.client()
        bench.check("the swarm", client)

        def measure(seconds: float, _round: int) -> Mapping[str, float]:
            swarm.set_delay(seconds)
            answer = client.answer(bench.prompt(PROMPT), new_tokens)
            return {f"{seconds}": median_gap_ms(answer)}

        figures = bench.rounds({f"{seconds * 1e3:.0f} ms one way": functools.partial(measure, seconds) for seconds in (0.0, *DELAYS)})
        swarm.set_delay(0.0)
    table, alone = bench.table, figures["0.0"]
    table.add(f"time per token, 3 servers behind proxies without delay, {dtype}", "ms", alone)
    for seconds in DELAYS:
        measured, hops = figures[f"{seconds}"], 3 * seconds * 1e3
        name = f"{seconds * 1e3:.0f} ms one way between any two machines, {dtype}: time per token"
        table.add(name, "ms", measured)
        bounds: dict[str, Any] = {"reach": 1.1, "aim": 1.05, "at_most": True} if seconds == DELAYS[-1] else {}
        table.ratio(f"{name} / sum of the ring's 3 hops ({hops:.0f} ms)", "x", measured, [hops] * len(measured), **bounds)
        table.ratio(f"{name} / those hops and what it takes without delay", "x", measured, [hops + own for own in alone])


# A server's death.

HISTORY = 1000


def recovery(bench: Bench) -> None:
    """In float32 the answer must stay the same, token for token."""
    for dtype in DTYPES:
        recovery_in(dtype, bench)


def recovery_in(dtype: str, bench: Bench) -> None:
    """The middle one of three servers is killed in mid-answer; another that holds the same blocks stands by."""
    kill_at, new_tokens, settle = 16, 48, 3.0  # tokens, tokens, seconds for the client to see a new server
    middle = even_spans(bench.blocks, 3)[1:2]
    prompt = bench.prompt(HISTORY - kill_at)
    with bench.processes() as processes:
        swarm = bench.swarm(processes, 3, dtype=dtype)
        client = swarm.client()
        bench.check("the swarm", client)
        undisturbed = client.answer(prompt, new_tokens)
        if dtype == "float32" and undisturbed.token_ids != stock_answers(bench.directory, [prompt], new_tokens)[0]:
            raise SystemExit("the swarm does not answer as stock transformers does, so its recovery does not count")
        swarm.add(middle)

        def measure(_round: int) -> Mapping[str, float]:
            time.sleep(settle)
            client.send(prompts=[prompt], new_tokens=new_tokens, say_at=kill_at)
            swarm.kill(client.read()["route"][1])
            (answer,) = client.read_answers()
            if dtype == "float32" and answer.token_ids != undisturbed.token_ids:
                raise SystemExit("an answer changed when its server was killed, so its recovery does not count")
            swarm.add(middle)
            return {"first token": answer.first_token_s, "pause": max(answer.gaps[kill_at - 1 :])}

        figures = bench.rounds({f"recovery, {dtype}": measure})
    bench.table.add(f"first token of a prompt of {len(prompt)} tokens, 3 servers, {dtype}", "s", figures["first token"])
    name = f"longest pause when a server is killed, history of {HISTORY:,} tokens, {dtype}"
    bench.table.add(name, "s", figures["pause"], reach=3.0, aim=1.0, at_most=True)


# Bytes.


class CountingHub(LocalHub):
    """Peers in one process whose frames are counted as they would be written to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[WireMessage, int]] = []

    def carry(self, sender: str, receiver: str, message: WireMessage) -> None:
        self.sent.append((message, sum(memoryview(part).nbytes for part in frames.encode(message))))
        super().carry(sender, receiver, message)


def wire_bytes(bench: Bench) -> None:
    """Frames as the servers' own code makes them, over a counting network; and what connections of real processes carry,
    less what they carry while nobody asks anything.
    """
    new_tokens, silence = 192, 10.0  # tokens, seconds
    hub = CountingHub()
    spans = even_spans(bench.blocks, 3)
    route = Route(tuple(Hop(f"server-{start}", start, end) for start, end in spans), seconds=0.0)
    transport = SwarmTransport(hub.join("client"), OneRoute(route))
    engines = [Engine(load_span(bench.directory, Span(start, end), dtype="bfloat16", weights="packed")) for start, end in spans]
    servers = [
        SpanServer(engine, hub.join(hop.peer), SpanServerConfig(wire_dtype="bfloat16"))
        for engine, hop in zip(engines, route.hops, strict=True)
    ]
    for engine in engines:
        engine.start()
    try:
        with Session(transport, "") as session:
            for _ in session.generate(bench.prompt(PROMPT), GenerationSettings(max_tokens_to_generate=new_tokens), timeout=60.0):
                pass
    finally:
        transport.close()
        for server in servers:
            server.close()
    steps = [(message, size) for message, size in hub.sent if isinstance(message, StepFrame) and len(message.tokens) == 1]
    hidden = [float(size) for message, size in steps if message.hidden is not None]
    ring = [float(size) for message, size in steps if message.hidden is None]
    tokens = [float(size) for message, size in hub.sent if isinstance(message, TokenFrame)]

    with bench.processes() as processes:
        swarm = bench.swarm(processes, 3, dtype="bfloat16", proxied=True)
        client = swarm.client()
        bench.check("the swarm", client)

        idle = carried(swarm, lambda: time.sleep(silence)) / silence

        def measure(_round: int) -> Mapping[str, float]:
            began = time.perf_counter()
            busy = carried(swarm, lambda: client.answer(bench.prompt(1), new_tokens))  # a longer prompt is hidden states of its own
            return {"carried": (busy - idle * (time.perf_counter() - began)) / new_tokens}

        figures = bench.rounds({"connections": measure})
    values = engines[0].model.arch.hidden
    table = bench.table
    table.add("frame that closes the ring, one token", "bytes", ring)
    table.add("frame to the client, one token", "bytes", tokens)
    table.add("all connections, encryption and multiplexing included, per token through 3 servers", "bytes", figures["carried"])
    table.add("frame between servers, one token, bf16", "bytes", hidden)
    name = f"frame between servers, one token / hidden size × 2 ({values * 2} bytes)"
    table.add(name, "x", [size / (values * 2) for size in hidden], reach=1.1, at_most=True)


@dataclass(frozen=True, slots=True)
class OneRoute:
    """A `Router` that knows one way."""

    only: Route

    def route(self, avoid: Collection[str], needed_tokens: int) -> Route:
        return self.only

    def quicker(self, route: Route, avoid: Collection[str], needed_tokens: int) -> Route | None:
        return None


def carried(swarm: CorollaSwarm, act: Callable[[], object]) -> int:
    before = swarm.bytes_carried
    act()
    return swarm.bytes_carried - before


# Memory of a client.

_BARE = "import hivemind, psutil; print(psutil.Process().memory_info().rss)"


def memory(bench: Bench) -> None:
    """`corolla generate --peers` as it is, looked at from outside every 10 ms; the most that it held counts."""
    with bench.processes() as processes:
        swarm = bench.swarm(processes, 3)
        asked = ["-p", "The capital of France is", "--max-new-tokens", "64"]
        command = [*COROLLA, "generate", str(bench.directory), "--peers", swarm.address, *asked]

        def measure(_round: int) -> Mapping[str, float]:
            bare = int(subprocess.run([sys.executable, "-c", _BARE], stdout=subprocess.PIPE, check=True).stdout)
            client = processes.start(command)
            own, others = peaks(client)
            if "Paris" not in processes.log(client):
                raise processes.fail(client, "`corolla generate` did not answer as it should")
            return {"bare": bare / 1e6, "own": own / 1e6, "beyond": (own - bare) / 1e6, "others": others / 1e6}

        figures = bench.rounds({"a client": measure})
    table = bench.table
    table.add("memory of a process after `import hivemind`", "MB", figures["bare"])
    table.add("memory of `corolla generate --peers`, at most", "MB", figures["own"])
    table.add("memory of its hivemind process and libp2p daemon, what is theirs alone", "MB", figures["others"])
    table.add("client memory beyond `import hivemind`", "MB", figures["beyond"], reach=80.0, aim=40.0, at_most=True)


def peaks(process: subprocess.Popen[str]) -> tuple[int, int]:
    """The most bytes that a process held until it ended, and that its children held of their own together."""
    own = others = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            own = max(own, watched.memory_info().rss)
            others = max(others, sum(child.memory_full_info().uss for child in watched.children(recursive=True)))
        time.sleep(0.01)
    return own, others


# How cost grows.

SERVERS = (1, 2, 3, 4, 6)
SESSIONS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 1024, 2048, 4096)


def growth(bench: Bench) -> None:
    new_tokens = 32
    histories = {context: bench.prompt(context) for context in CONTEXTS}
    with bench.processes() as processes:
        clients = {servers: bench.swarm(processes, servers).client() for servers in SERVERS}
        bench.check("the swarm", clients[3])

        def by_servers(servers: int, _round: int) -> Mapping[str, float]:
            answer = clients[servers].answer(bench.prompt(PROMPT), new_tokens)
            return {f"time per token, {_plural(servers, 'server')}": median_gap_ms(answer)}

        def by_sessions(sessions: int, _round: int) -> Mapping[str, float]:
            answers = clients[3].answers([bench.prompt(PROMPT) for _ in range(sessions)], new_tokens)
            return {f"3 servers, {_plural(sessions, 'session')}, all together": decode_rate(answers)}

        def by_context(context: int, _round: int) -> Mapping[str, float]:
            """A session of each length stays; each round goes back to it and on from there."""
            (answer,) = clients[3].answers([histories[context] + bench.prompt(1)], new_tokens, keep=f"context-{context}")
            return {f"3 servers, time per token at {context:,} tokens of context": median_gap_ms(answer)}

        cells: dict[str, Callable[[int], Mapping[str, float]]] = {}
        for what, work in ((SERVERS, by_servers), (SESSIONS, by_sessions), (CONTEXTS, by_context)):
            for number in what:
                cells[f"{work.__name__.replace('_', ' ')}: {number}"] = functools.partial(work, number)
        figures = bench.rounds(cells)
    for name, values in figures.items():
        bench.table.add(name, "tokens/s" if name.endswith("together") else "ms", values)


PARTS: dict[str, Callable[[Bench], None]] = {
    **{name: functools.partial(petals, shape) for name, shape in SHAPES.items()},
    "overhead": overhead,
    "delay": delay,
    "recovery": recovery,
    "bytes": wire_bytes,
    "memory": memory,
    "growth": growth,
}


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--petals-python", type=Path, metavar="PYTHON", help="an interpreter that can import petals")
    parser.add_argument("--petals-threads", type=int, nargs="+", help="of a Petals server, each setting in turn; the better one counts")
    parser.add_argument(
        "--petals-stored", choices=("float16", "float32"), default="float16", help="the checkpoints beside Petals; BLOOM's are float16"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each Corolla server and of the engine beside them")
    parser.add_argument("--model", default=catalog.DEFAULT, help="alias, directory or hub id, of every part but Petals'")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more warms up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # as Ctrl-C: what was started ends with it
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    settings = {
        "model": options.model,
        "dtype": DEFAULT_DTYPE,
        "threads": options.threads,
        "stored beside Petals": options.petals_stored,
        "rounds": options.rounds,
        "parts": " ".join(part for part in PARTS if part in options.only),
    }
    packages = {"hivemind": version("hivemind")}
    if options.petals_python is not None:
        packages["petals"] = PetalsSwarm.version(options.petals_python)
    table = Table("swarm", settings, packages)
    with tempfile.TemporaryDirectory(prefix="corolla-swarm-") as folder:
        bench = Bench(options, Path(folder), table, catalog.resolve(options.model))
        for part in PARTS:
            if part in options.only:
                began = time.monotonic()
                print(f"{part} ...", file=sys.stderr, flush=True)
                PARTS[part](bench)
                print(f"{part} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    table.report(options.json)


if __name__ == "__main__":
    main()
