"""The picture of an evaluation."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from corolla.errors import DataError
from corolla.models.saving import replacing

_BINS = 40


def plot_evaluation(
    path: Path, losses: Mapping[str, Sequence[float]], words: Mapping[str, Mapping[str, float]], lengths: Sequence[int]
) -> None:
    """Write a PNG with what there is: the loss of each article by data (nats a token), tokens per word (tokenizer -> language -> figure),
    the lengths of answers in tokens.

    Raises `DataError` when matplotlib is missing or there is nothing to draw, `StorageError` when the disk refuses.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise DataError("pictures need a library: pip install 'corolla[data]'") from None
    parts = [part for part, there in (("loss", losses), ("words", words), ("lengths", lengths)) if there]
    if not parts:
        raise DataError(f"{path}: there is nothing to draw")
    figure = figures.Figure(figsize=(6 * len(parts), 4.5), layout="constrained")
    for place, part in enumerate(parts, start=1):
        axes = figure.add_subplot(1, len(parts), place)
        if part == "loss":
            axes.hist(list(losses.values()), bins=_BINS, label=[Path(name).name for name in losses])
            axes.set(xlabel="loss of an article, nats a token", ylabel="articles")
            axes.legend()
        elif part == "words":
            languages = list(next(iter(words.values())))
            width = 0.8 / len(words)
            for index, (tokenizer, figures_of) in enumerate(words.items()):
                axes.bar([i + index * width for i in range(len(languages))], list(figures_of.values()), width, label=Path(tokenizer).name)
            axes.set(ylabel="tokens a word")
            axes.set_xticks([i + 0.4 - width / 2 for i in range(len(languages))], languages)
            axes.legend()
        else:
            axes.hist(list(lengths), bins=_BINS)
            axes.set(xlabel="tokens of an answer", ylabel="answers")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
