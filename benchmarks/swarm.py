"""The swarm on one machine, real processes over real hivemind: beside Petals, beside the engine in one process, and as it grows.

    python benchmarks/swarm.py [--petals-python PYTHON] [--only overhead recovery ...] [--json FILE]

PYTHON is an interpreter that has Petals (make_petals_peer.sh makes one); without it those rows are left out. Every part
starts its swarms, measures everything once a round in turn, and ends them. Speeds count when the answers are right: those of
random weights are compared with stock transformers, token for token. Clients are processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from common import Table
from corolla.models import catalog
from corolla.models.span import load_span
from runners import Corolla, Runner, decode_rate, median_gap_ms
from swarm_bench import DEFAULT_DTYPE, DTYPES, PROMPT, Bench, plural
from swarm_drafts import drafts
from swarm_petals import SHAPES, petals, stock_answers
from swarm_servers import PetalsSwarm, even_spans
from swarm_sizes import memory, wire_bytes

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
    """Every connection goes through a proxy that holds each chunk in each direction. What it held them for is measured: a hop of the
    ring is one chunk, and a proxy's clock wakes up a little late."""
    new_tokens = 24
    with bench.processes() as processes:
        swarm = bench.swarm(processes, 3, dtype=dtype, proxied=True)
        client = swarm.client()
        bench.check("the swarm", client)

        def measure(seconds: float, _round: int) -> Mapping[str, float]:
            swarm.set_delay(seconds)
            (chunks, held), answer = swarm.chunks_held, client.answer(bench.prompt(PROMPT), new_tokens)
            chunks, held = swarm.chunks_held[0] - chunks, swarm.chunks_held[1] - held
            return {f"{seconds}": median_gap_ms(answer), f"hops, {seconds}": 3e3 * held / chunks}

        figures = bench.rounds({f"{seconds * 1e3:.0f} ms one way": functools.partial(measure, seconds) for seconds in (0.0, *DELAYS)})
        swarm.set_delay(0.0)
    table, alone = bench.table, figures["0.0"]
    table.add(f"time per token, 3 servers behind proxies without delay, {dtype}", "ms", alone)
    for seconds in DELAYS:
        measured, hops = figures[f"{seconds}"], figures[f"hops, {seconds}"]
        name = f"{seconds * 1e3:.0f} ms one way between any two machines, {dtype}: time per token"
        table.add(name, "ms", measured)
        table.add(f"{name}, of which the ring's 3 hops", "ms", hops)
        bounds: dict[str, Any] = {"reach": 1.1, "aim": 1.05, "at_most": True} if seconds == DELAYS[-1] else {}
        table.ratio(f"{name} / sum of the ring's 3 hops", "x", measured, hops, **bounds)
        both = [hop + own for hop, own in zip(hops, alone, strict=True)]
        table.ratio(f"{name} / those hops and what it takes without delay", "x", measured, both)


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
            return {f"time per token, {plural(servers, 'server')}": median_gap_ms(answer)}

        def by_sessions(sessions: int, _round: int) -> Mapping[str, float]:
            answers = clients[3].answers([bench.prompt(PROMPT) for _ in range(sessions)], new_tokens)
            return {f"3 servers, {plural(sessions, 'session')}, all together": decode_rate(answers)}

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
    "drafts": drafts,
    "recovery": recovery,
    "bytes": wire_bytes,
    "memory": memory,
    "growth": growth,
}


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
