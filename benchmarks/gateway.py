"""What a gateway costs: processor time a token, time to the first token, 64 streams at once, memory; and the page: weight and first paint.

    python benchmarks/gateway.py [MODEL] [--rounds 3] [--tokens 64] [--no-page] [--json FILE]

Two servers of one thread each and a gateway are started here. The gateway's own time is its process's (user and system, the swarm's
client in it) while streams are open, less what an idle second takes. The first token over HTTP, and the first words on the page in
Chromium after a click on Send, are held against the first token of an engine alone, of one thread and in this process, round by round;
no prompt is ever asked twice, for then it would be cached. A client that goes away closes its connection after the first token; then the
gateway is asked every few milliseconds for the streams that are open and the sessions that are held at the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import torch

import corolla
from common import Table
from corolla.chat.templates import Turn, default_template, encode
from corolla.client.tokenizer import TextTokenizer
from corolla.models.catalog import describe, resolve
from corolla.models.span import load_span
from corolla.types import Span
from gateway_page import Page, page_of
from runners import Corolla
from swarm_servers import COROLLA, CorollaSwarm, Processes, even_spans

PROMPT = "The history of the city begins with a village of fishermen on the northern bank of the river, " * 4
CPU_AIM, TTFT_AIM, MEMORY_AIM, WEIGHT_AIM, PAINT_AIM, LEAVING_AIM = 0.3, 1.2, 450.0, 150.0, 1.0, 1.0
_START, _LEFT = 120.0, 30.0  # seconds
_REPEATS = 5  # first tokens a round
_numbers = itertools.count(100)


def new_prompt() -> str:
    """As long as all others, and other from its first token on."""
    return f"{next(_numbers)}. {PROMPT}"


@dataclass(frozen=True, slots=True)
class Stream:
    first: float  # seconds to the first token
    tokens: int
    seconds: float


async def stream(client: httpx2.AsyncClient, tokens: int) -> Stream:
    body = {"prompt": new_prompt(), "max_tokens": tokens, "temperature": 0, "stream": True, "logprobs": 0}
    began = time.perf_counter()
    first, count = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and '"logprobs":{' in line:
                first = first or time.perf_counter() - began
                count += 1
    return Stream(first, count, time.perf_counter() - began)


def streams(url: str, count: int, tokens: int) -> list[Stream]:
    """So many at once."""

    async def all_of_them() -> list[Stream]:
        limits = httpx2.Limits(max_connections=count)
        async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            return list(await asyncio.gather(*(stream(client, tokens) for _ in range(count))))

    with ThreadPoolExecutor(1) as thread:  # Playwright has an event loop on this one
        return thread.submit(asyncio.run, all_of_them()).result()


def left(url: str) -> float:
    """Seconds from a client's leaving in mid-answer until the gateway has closed its session at the servers."""
    with httpx2.Client(base_url=url, timeout=600) as client:
        before = held(client)
        body = {"prompt": new_prompt(), "max_tokens": 400, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(line for line in response.iter_lines() if line.startswith("data: {"))
        began = time.perf_counter()
        while held(client) > before:
            if time.perf_counter() - began > _LEFT:
                raise SystemExit(f"a client has left, and after {_LEFT:g} s its session is still held")
            time.sleep(0.002)
        return time.perf_counter() - began


def held(client: httpx2.Client) -> float:
    """Streams that are open and sessions that are kept, together."""
    gauges = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    return float(gauges["corolla_streams"]) + float(gauges["corolla_sessions"])


def busy(process: psutil.Process) -> float:
    """Seconds that the process's own threads have computed."""
    times = process.cpu_times()
    return float(times.user + times.system)


def daemon_of(gateway: psutil.Process) -> psutil.Process:
    """hivemind's libp2p daemon, which carries the gateway's frames."""
    return next(child for child in gateway.children(recursive=True) if "p2pd" in child.name())


@contextmanager
def started(processes: Processes, swarm: CorollaSwarm, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A gateway: its address, and its process."""
    ready = processes.new_path("ready")
    command = [*COROLLA, "gateway", str(swarm.directory), "--peers", swarm.address, "--port", "0", "--ready-file", str(ready)]
    process = processes.start([*command, "--database", str(folder / "gateway.sqlite"), "--log-level", "warning"])
    deadline = time.monotonic() + _START
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise processes.fail(process, "the gateway did not start")
        time.sleep(0.05)
    yield ready.read_text(encoding="utf-8").strip(), psutil.Process(process.pid)


class Figures:
    """What is measured in each round."""

    def __init__(self, url: str, gateway: psutil.Process, engine: Corolla, tokenizer: TextTokenizer, page: Page | None) -> None:
        self.url, self.gateway, self.daemon, self.page = url, gateway, daemon_of(gateway), page
        self._engine, self._tokenizer = engine, tokenizer
        self._template = default_template(tokenizer, "")
        self.cpu: list[float] = []
        self.carried: list[float] = []
        self.http: list[float] = []
        self.words: list[float] = []
        self.paint: list[float] = []
        self.evenness: list[float] = []
        self.pause: list[float] = []
        self.memory: list[float] = []
        self.leaving: list[float] = []

    def measure(self, tokens: int) -> None:
        """One round."""
        self._processor_time(tokens)
        self._first_tokens()
        self.leaving += [left(self.url) for _ in range(_REPEATS)]
        crowd = streams(self.url, 64, max(2, tokens // 4))
        rates = [each.tokens / each.seconds for each in crowd]
        self.evenness.append(min(rates) / statistics.mean(rates))
        self.pause.append(max(each.first for each in crowd) / statistics.mean(each.first for each in crowd))
        self.memory.append(self.gateway.memory_info().rss / 1e6)

    def _processor_time(self, tokens: int) -> None:
        before = busy(self.gateway), busy(self.daemon)
        time.sleep(2.0)
        idle = [(busy(process) - each) / 2.0 for process, each in zip((self.gateway, self.daemon), before, strict=True)]
        before, began = (busy(self.gateway), busy(self.daemon)), time.perf_counter()
        found = streams(self.url, 16, tokens)
        seconds, count = time.perf_counter() - began, sum(each.tokens for each in found)
        self.cpu.append(1000 * (busy(self.gateway) - before[0] - idle[0] * seconds) / count)
        self.carried.append(1000 * (busy(self.daemon) - before[1] - idle[1] * seconds) / count)

    def _first_tokens(self) -> None:
        alone, through, chat_alone, words = [], [], [], []
        for _ in range(_REPEATS):
            alone.append(self._engine.answer(self._tokenizer.encode(new_prompt(), opening=True), 2).times[0])
            through.append(streams(self.url, 1, 2)[0].first)
            if self.page is not None:
                chat_alone.append(self._engine.answer(self._chat(new_prompt()), 2).times[0])
                words.append(self.page.first_words(new_prompt()))
        self.http.append(statistics.median(through) / statistics.median(alone))
        if self.page is not None:
            self.words.append(statistics.median(words) / statistics.median(chat_alone))
            self.paint.append(self.page.first_paint())

    def _chat(self, question: str) -> list[int]:
        return encode(self._template, self._tokenizer, self._template.system, [Turn("user", question)])


def page_weight() -> float:
    """All of the page's files, gzipped, in kB."""
    static = Path(corolla.__file__).parent / "gateway" / "static"
    return sum(len(gzip.compress(path.read_bytes())) for path in static.rglob("*") if path.is_file()) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--no-page", action="store_true", help="without Chromium")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # as Ctrl-C: what was started ends with it
    torch.set_num_threads(1)
    directory = resolve(options.model)
    blocks = describe(options.model, directory).blocks or 0
    tokenizer = TextTokenizer(directory)
    table = Table("gateway", {"model": options.model, "servers": 2, "tokens": options.tokens, "rounds": options.rounds})
    with (
        tempfile.TemporaryDirectory() as folder,
        Processes(Path(folder)) as processes,
        started(processes, CorollaSwarm(processes, directory, even_spans(blocks, 2), threads=1), Path(folder)) as (url, gateway),
        nullcontext() if options.no_page else page_of(url) as page,
    ):
        engine = Corolla(load_span(directory, Span(0, blocks)))
        figures = Figures(url, gateway, engine, tokenizer, page)
        streams(url, 16, 4)  # connections and kernels are there
        engine.answer(tokenizer.encode(new_prompt()), 4)
        if page is not None:
            page.first_words("Who are you?")
        for number in range(options.rounds):
            figures.measure(options.tokens)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    table.add("processor time a token at 16 streams", "ms", figures.cpu, reach=CPU_AIM, at_most=True)
    table.add("and of its libp2p daemon", "ms", figures.carried)
    table.add("first token over HTTP and swarm / engine alone", "times", figures.http, reach=TTFT_AIM, at_most=True)
    if page is not None:
        table.add("first words on the page / engine alone", "times", figures.words, reach=TTFT_AIM, at_most=True)
        table.add("first contentful paint", "s", figures.paint, reach=PAINT_AIM, at_most=True)
    table.add("the page's files, gzipped", "kB", [page_weight()], reach=WEIGHT_AIM, at_most=True)
    table.add("64 streams: the slowest one's rate / the mean", "times", figures.evenness)
    table.add("64 streams: the last one's first token / the mean", "times", figures.pause)
    table.add("a client goes away: until its session is closed", "s", figures.leaving, reach=LEAVING_AIM, at_most=True)
    table.add("memory", "MB", figures.memory, reach=MEMORY_AIM, at_most=True)
    table.report(options.json)


if __name__ == "__main__":
    main()
