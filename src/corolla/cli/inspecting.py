"""Prepared sequences on the terminal, with what is trained on in colour."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from corolla.data.dataset import PackedDataset
from corolla.data.layout import TOKENIZER, Part
from corolla.data.tokens import Kind, Tokens, TrainingTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

_STYLES = {Kind.PROMPT: "", Kind.COMPLETION: "green", Kind.END: "bold green", Kind.PADDING: "dim"}


def show(directory: Path, part: Part, count: int) -> None:
    """Check the sums of `directory` and print the first `count` sequences of a part.

    Where there is no colour, what is trained on stands in ⟦ ⟧. Raises `DataError` when something is missing or damaged.
    """
    console = Console(highlight=False, soft_wrap=True)
    with PackedDataset(directory, part) as dataset:
        tokenizer = TrainingTokenizer(directory / TOKENIZER)
        for number in range(min(count, len(dataset))):
            sequence = dataset.sequence(number)
            console.rule(f"sequence {number} of {len(dataset)}: {int(sequence.trained.sum())} of {len(sequence)} tokens are trained on")
            console.print(Text.assemble(*pieces(tokenizer, sequence, marked=console.color_system is None)))


def pieces(tokenizer: TrainingTokenizer, sequence: Tokens, *, marked: bool) -> Iterator[tuple[str, str]]:
    """Runs of tokens of one kind as text, each with its style; padding is counted, not written."""
    start = 0
    for kind, run in groupby(sequence.token_type_ids.tolist()):
        end = start + len(list(run))
        text = f"({end - start} tokens of padding)" if kind == Kind.PADDING else tokenizer.spelled(sequence.input_ids[start:end].tolist())
        yield f"⟦{text}⟧" if marked and sequence.trained[start] else text, _STYLES[Kind(kind)]
        start = end
