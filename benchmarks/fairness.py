"""What one client's sessions cost another: 12 tokens of one client while another keeps six long answers going, against the same alone.

    python benchmarks/fairness.py [--model smollm2] [--answers 12] [--cache-tokens 2048] [--json FILE]

One server process and two client processes. The six answers need more pages than the cache has, and are asked for again as they end.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path

import torch

from common import Table
from corolla.models import catalog
from corolla.models.checkpoint import Checkpoint
from corolla.models.families import architecture
from swarm_servers import Client, CorollaSwarm, Processes

SESSIONS, LONG_PROMPT, LONG_ANSWER = 6, 330, 600
PROMPT, ANSWER = 60, 12
SETTLING = 10.0  # seconds until the six answers hold what they can


def prompts(count: int, length: int) -> list[list[int]]:
    return [[random.randrange(100, 40_000) for _ in range(length)] for _ in range(count)]


def seconds(client: Client) -> float:
    """Of an answer to a prompt that nobody asked before, until its last token."""
    return client.answer(prompts(1, PROMPT)[0], ANSWER).times[-1]


def keep_asking(client: Client, enough: threading.Event) -> None:
    while not enough.is_set():
        client.answers(prompts(SESSIONS, LONG_PROMPT), LONG_ANSWER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=catalog.DEFAULT, help="alias, directory or hub id")
    parser.add_argument("--answers", type=int, default=12, help="that are timed, alone and beside the others")
    parser.add_argument("--cache-tokens", type=int, default=2048, help="of the server")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()

    directory = catalog.resolve(options.model)
    with Checkpoint(directory) as checkpoint:
        blocks = architecture(checkpoint.config).blocks
    table = Table("fairness", {key: value for key, value in vars(options).items() if key != "json"})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
        cache = ["--cache-tokens", str(options.cache_tokens)]
        swarm = CorollaSwarm(processes, directory, [(0, blocks)], threads=options.threads, more=cache)
        honest, greedy = swarm.client(), swarm.client()
        for client in (honest, greedy):
            seconds(client)
        alone = [seconds(honest) for _ in range(options.answers)]
        enough = threading.Event()
        asking = threading.Thread(target=keep_asking, args=(greedy, enough), daemon=True)
        asking.start()
        time.sleep(SETTLING)
        newcomer = swarm.client()
        beside = [seconds(newcomer)]  # also of a client that has never been here
        beside += [seconds(honest) for _ in range(options.answers - 1)]
        enough.set()
    table.add(f"{ANSWER} tokens alone", "s", alone)
    table.add(f"{ANSWER} tokens beside {SESSIONS} long answers of another client", "s", beside)
    usual = sorted(alone)[len(alone) // 2]
    table.add("beside them, against alone", "x", [value / usual for value in beside], reach=2.5, at_most=True)
    table.report(options.json)


if __name__ == "__main__":
    main()
