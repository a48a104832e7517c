"""What a gateway costs: processor time a token, time to the first token, 64 streams at once, memory.

    python benchmarks/gateway.py [MODEL] [--rounds 3] [--tokens 64] [--json FILE]

Two servers and a gateway are started here. The gateway's own time is its process's (user and system, the swarm's client in it) while
streams are open, less what an idle second takes; the first token over HTTP is held against that of a client of the same swarm without
a gateway, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

from common import Table
from corolla.client.tokenizer import TextTokenizer
from corolla.models.catalog import describe, resolve
from swarm_servers import COROLLA, CorollaSwarm, Processes, even_spans

PROMPT = "The history of the city begins with a village of fishermen on the northern bank of the river, " * 4
CPU_AIM, TTFT_AIM, MEMORY_AIM = 0.3, 1.2, 450.0
_START = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Stream:
    first: float  # seconds to the first token
    tokens: int
    seconds: float


async def stream(client: httpx2.AsyncClient, number: int, tokens: int) -> Stream:
    body = {"prompt": f"{number}. {PROMPT}", "max_tokens": tokens, "temperature": 0, "stream": True, "logprobs": 0}
    began = time.perf_counter()
    first, count = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and '"logprobs":{' in line:
                first = first or time.perf_counter() - began
                count += 1
    return Stream(first, count, time.perf_counter() - began)


async def streams(url: str, count: int, tokens: int) -> list[Stream]:
    limits = httpx2.Limits(max_connections=count)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        return list(await asyncio.gather(*(stream(client, number, tokens) for number in range(count))))


def busy(process: psutil.Process) -> float:
    """Seconds that the process's own threads have computed."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    directory = resolve(options.model)
    blocks = describe(options.model, directory).blocks or 0
    tokenizer = TextTokenizer(directory)
    table = Table("gateway", {"model": options.model, "servers": 2, "tokens": options.tokens, "rounds": options.rounds})
    cpu, ratio, starved, memory = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
        swarm = CorollaSwarm(processes, directory, even_spans(blocks, 2), threads=1)
        ready = processes.new_path("ready")
        command = [*COROLLA, "gateway", str(directory), "--peers", swarm.address, "--port", "0", "--ready-file", str(ready)]
        process = processes.start([*command, "--database", str(Path(folder) / "gateway.sqlite"), "--log-level", "warning"])
        deadline = time.monotonic() + _START
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise processes.fail(process, "the gateway did not start")
            time.sleep(0.05)
        url = ready.read_text(encoding="utf-8").strip()
        gateway = psutil.Process(process.pid)
        client = swarm.client()
        asyncio.run(streams(url, 2, 4))  # connections and kernels are there
        client.answer(tokenizer.encode(f"x {PROMPT}"), 4)
        for number in range(options.rounds):
            before = busy(gateway)
            time.sleep(2.0)
            idle = (busy(gateway) - before) / 2.0
            before, began = busy(gateway), time.perf_counter()
            found = asyncio.run(streams(url, 16, options.tokens))
            spent = busy(gateway) - before - idle * (time.perf_counter() - began)
            cpu.append(1000 * spent / sum(each.tokens for each in found))
            alone = client.answer(tokenizer.encode(f"{number} alone. {PROMPT}"), 2).times[0]
            through = asyncio.run(streams(url, 1, 2))[0].first
            ratio.append(through / alone)
            crowd = asyncio.run(streams(url, 64, max(2, options.tokens // 4)))
            starved.append(
                min(each.tokens / each.seconds for each in crowd) / statistics.mean(each.tokens / each.seconds for each in crowd)
            )
            memory.append(gateway.memory_info().rss / 1e6)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    table.add("processor time a token at 16 streams", "ms", cpu, reach=CPU_AIM, at_most=True)
    table.add("first token over HTTP / without a gateway", "times", ratio, reach=TTFT_AIM, at_most=True)
    table.add("64 streams: the slowest one's rate / the mean", "times", starved)
    table.add("memory", "MB", memory, reach=MEMORY_AIM, at_most=True)
    table.report(options.json)


if __name__ == "__main__":
    main()
