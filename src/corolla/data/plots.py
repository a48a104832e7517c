"""Pictures of prepared data: how long its articles are, and how full its sequences."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from corolla.data.dataset import PackedDataset
from corolla.data.layout import PARTS, Part, part_files
from corolla.data.packing import unpack
from corolla.data.saving import replacing
from corolla.data.tokens import Kind, count
from corolla.errors import DataError

_BINS = 50


def plot_lengths(directory: Path) -> list[Path]:
    """Write histograms of the articles' lengths and of the sequences' utilization beside the data; return where they are.

    Raises `DataError` when the data is damaged or matplotlib is missing, `StorageError` when the disk refuses.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise DataError("pictures need a library: pip install 'corolla[data]'") from None
    lengths: dict[Part, npt.NDArray[np.int64]] = {}
    used: dict[Part, npt.NDArray[np.float64]] = {}
    for part in PARTS:
        if part_files(directory, part):
            with PackedDataset(directory, part) as dataset:
                packing = dataset.metadata.get("packing", "greedy")
                lengths[part] = np.array([len(article) for article in unpack(dataset.sequences(), packing)])
                full = dataset.max_length
                used[part] = np.array([1 - count(sequence, Kind.PADDING) / full for sequence in dataset.sequences()])
    if not lengths:
        raise DataError(f"{directory} has no prepared data: prepare it first")
    pictures = (
        ("lengths.png", lengths, "tokens of an article", "articles"),
        ("utilization.png", used, "share of a sequence that is not padding", "sequences"),
    )
    paths = []
    for name, values, along, up in pictures:
        figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel=along, ylabel=up)
        axes.hist(list(values.values()), bins=_BINS, label=list(values), stacked=True)
        axes.legend()
        with replacing(directory / name) as path:
            figure.savefig(path, format="png", dpi=120)
        paths.append(directory / name)
    return paths
