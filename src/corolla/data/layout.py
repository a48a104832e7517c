"""What lies where in a directory of prepared data.

    train_1_of_4.hdf5 ... dev_1_of_1.hdf5 ... test.hdf5    packed sequences, as `hdf5` has them
    metadata.yaml metrics.json tokenizer/                  what they are, how they came about, what spells them
    SHA256SUMS                                             of all of the above; written last: without it nothing is whole

Sequence `s` of a part is row `s // N` of its file `s % N + 1`, so rows are balanced over files, and their order is kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml

from corolla.data.saving import SUMS
from corolla.errors import DataError

Part = Literal["train", "dev", "test"]
PARTS: tuple[Part, ...] = ("train", "dev", "test")
METADATA = "metadata.yaml"
METRICS = "metrics.json"
TOKENIZER = "tokenizer"
UNFINISHED = "unfinished"  # a run's own directory in the one that it prepares

_NUMBERED = re.compile(r"_(\d+)_of_(\d+)\.hdf5")


def file_names(part: Part, count: int) -> list[str]:
    """The names of the `count` files of a part, in their order."""
    if part == "test" and count == 1:
        return ["test.hdf5"]
    return [f"{part}_{number}_of_{count}.hdf5" for number in range(1, count + 1)]


def part_files(directory: Path, part: Part) -> list[Path]:
    """The files of a part, in their order; none where there is no such part.

    Raises `DataError` when the directory is missing or not finished, or some of the files are.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} does not exist: prepare the data first")
    if (directory / UNFINISHED).exists():
        raise DataError(f"{directory} is not finished: run the same `corolla prepare` again, it goes on where it was")
    if (alone := directory / f"{part}.hdf5").exists():
        return [alone]
    found = [(path, match) for path in directory.glob(f"{part}_*.hdf5") if (match := _NUMBERED.fullmatch(path.name, len(part)))]
    if not found:
        return []
    names = file_names(part, int(found[0][1][2]))
    if {path.name for path, _ in found} != set(names):
        raise DataError(f"{directory} has {len(found)} files of {part}, which are not all of one set: prepare the data again")
    return [directory / name for name in names]


def read_metadata(directory: Path) -> dict[str, Any]:
    """What `METADATA` says. Raises `DataError` when it is missing or damaged."""
    path = directory / METADATA
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{path} is missing or damaged: prepare the data again")
    return content


def is_whole(directory: Path) -> bool:
    """Whether a run has finished there."""
    return (directory / SUMS).is_file() and not (directory / UNFINISHED).exists()
