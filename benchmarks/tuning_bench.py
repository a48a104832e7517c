"""What the parts of tuning.py share."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import Table, rounds
from swarm_petals import SHAPES, Shape, make_bloom
from swarm_servers import Client, CorollaSwarm, Processes, even_spans

Cell = Callable[[int], Mapping[str, float]]
HERE = Path(__file__).parent
TINY = Shape("a tiny BLOOM", 64, 4, 4, 24, (1,), single=(0, 0), together=(0, 0))


class Bench:
    """Settings, the table, and what the parts start."""

    def __init__(self, options: argparse.Namespace, table: Table, folder: Path) -> None:
        self.options, self.table, self.folder = options, table, folder
        self.shape = TINY if options.shape == "tiny" else SHAPES[options.shape]
        self.directory = folder / "bloom"
        make_bloom(self.directory, self.shape, "float32")

    @property
    def spans(self) -> list[tuple[int, int]]:
        return even_spans(self.shape.blocks, 2)

    def corolla(self, processes: Processes, dtype: str) -> CorollaSwarm:
        return CorollaSwarm(processes, self.directory, self.spans, threads=self.options.threads, dtype=dtype)

    @property
    def run(self) -> Path:
        """Where the quality part's run is."""
        return self.options.run or self.folder / "prompt"

    def client(
        self,
        processes: Processes,
        kind: str,
        *arguments: str,
        python: Path | str = sys.executable,
        threads: int | None = None,
        directory: Path | None = None,
    ) -> Client:
        threads = threads or self.options.client_threads
        command = [python, HERE / "tuning_peer.py", kind, threads, directory or self.directory, *arguments]
        return Client(processes, [str(part) for part in command])

    def ask(self, client: Client) -> dict[str, Any]:
        client.send(steps=self.options.steps, batch=self.options.batch, length=self.options.length)
        return client.read()

    def rounds(self, cells: Mapping[str, Cell]) -> dict[str, list[float]]:
        """`common.rounds`, telling each figure when it is there: what a time limit cuts off has measured something."""

        def telling(cell: Cell, number: int) -> Mapping[str, float]:
            figures = cell(number)
            for name, value in figures.items():
                print(f"  {number + 1}  {name}: {value:.2f}", file=sys.stderr, flush=True)
            return figures

        return rounds(self.options.rounds, {name: functools.partial(telling, cell) for name, cell in cells.items()})

    def rate(self, answer: Mapping[str, Any]) -> float:
        """Tokens a second, soft ones not counted."""
        return self.options.batch * self.options.length / statistics.median(answer["seconds"])


def layers(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text())
    return int(config.get("num_hidden_layers") or config["n_layer"])
