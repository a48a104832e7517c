"""What every part of swarm.py needs: settings, the table, rounds, swarms of a model."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, cast

from common import Table, rounds
from corolla.client.tokenizer import TextTokenizer
from corolla.models import catalog
from corolla.server.embedded import fast_dtype
from engine import check_peer
from runners import Runner
from swarm_servers import CorollaSwarm, Processes, even_spans

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


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
