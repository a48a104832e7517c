"""What the benchmarks share: rows of repeated measurements, one table, the machine they were made on, JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("corolla", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, measured once a round. `reach` and `aim` are what it is held against; `at_most` turns them round."""

    name: str
    unit: str
    values: list[float]
    reach: float | None = None
    aim: float | None = None
    at_most: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        if self.reach is None:
            return None
        return self.median <= self.reach if self.at_most else self.median >= self.reach

    def cells(self) -> list[str]:
        sign = "≤ " if self.at_most else ""
        return [
            self.name,
            _figure(self.median),
            f"{_figure(min(self.values))} – {_figure(max(self.values))}",
            self.unit,
            "" if self.reach is None else f"{sign}{_figure(self.reach)} {'✓' if self.reached else '✗'}",
            "" if self.aim is None else f"{sign}{_figure(self.aim)}",
        ]


@dataclass(slots=True)
class Table:
    """The one table that a benchmark prints: medians, their spread, and what was to be reached."""

    benchmark: str
    settings: Mapping[str, Any]
    packages: Mapping[str, str] = field(default_factory=dict)  # versions of peers, beside our own
    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, unit: str, values: Sequence[float], **bounds: Any) -> None:
        self.rows.append(Row(name, unit, list(values), **bounds))

    def ratio(self, name: str, unit: str, ours: Sequence[float], theirs: Sequence[float], **bounds: Any) -> None:
        """Round by round, because both sides of a round met the same noise."""
        self.add(name, unit, [a / b for a, b in zip(ours, theirs, strict=True)], **bounds)

    def markdown(self) -> str:
        head = ["", "median", "min – max", "unit", "reach", "aim"]
        body = [row.cells() for row in self.rows]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [head, ["-" * width for width in widths], *body]
        return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)

    def report(self, json_file: Path | None) -> None:
        """Print the machine, the versions and the table; write the same to `json_file`."""
        machine, versions = describe_machine(), {**package_versions(), **self.packages}
        for facts in (machine, versions, self.settings):
            print(", ".join(f"{key} {value}" for key, value in facts.items()))
        print()
        print(self.markdown())
        if json_file is not None:
            content = {
                "benchmark": self.benchmark,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": machine,
                "versions": versions,
                "settings": dict(self.settings),
                "rows": [asdict(row) | {"median": row.median, "reached": row.reached} for row in self.rows],
            }
            json_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rounds(repeats: int, cells: Mapping[str, Callable[[int], Mapping[str, float]]]) -> dict[str, list[float]]:
    """Measure every cell once a round (A B C, A B C, ...), so that a machine's moods meet all of them alike.

    A cell takes the round's number and returns named figures. Round -1 warms up and does not count.
    """
    figures: dict[str, list[float]] = {}
    for number in range(-1, repeats):
        for name, cell in cells.items():
            _progress(f"{'warm-up' if number < 0 else f'{number + 1}/{repeats}'}  {name}")
            for figure, value in cell(number).items():
                if number >= 0:
                    figures.setdefault(figure, []).append(value)
    _progress("")
    return figures


def describe_machine() -> dict[str, str]:
    described = {
        "CPU": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
    }
    if torch.cuda.is_available():
        described["GPU"] = torch.cuda.get_device_name()
    return described


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def resident_bytes() -> int:
    """What this process holds of the machine's memory."""
    return psutil.Process().memory_info().rss


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _figure(value: float) -> str:
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"
