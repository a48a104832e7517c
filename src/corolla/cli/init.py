"""`corolla init`: a small model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the model goes: a new directory.")],
    tokenizer_from: Annotated[
        list[str], typer.Option(metavar="DATA", help="Train the tokenizer on this: a file, a directory, or a dataset; may be repeated.")
    ],
    family: Annotated[str, typer.Option(help="bloom or llama.")] = "bloom",
    hidden: Annotated[int, typer.Option(help="The width.")] = 256,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 4,
    heads: Annotated[int | None, typer.Option(help="Attention heads; of 32 dimensions by default.")] = None,
    vocabulary: Annotated[int, typer.Option(help="The most tokens that the tokenizer may have.")] = 4096,
    context: Annotated[int, typer.Option(help="The longest text that it is meant for, in tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    format: Annotated[str | None, typer.Option(help="Of the data; recognized by default.")] = None,
) -> None:
    """Make a small model with random weights and a tokenizer trained on your data.

    The result is a model's directory as any other, which `corolla finetune` trains.

    Example: `corolla init --tokenizer-from dialogues.jsonl --output tiny`
    """
    from rich.console import Console

    from corolla.data.problems import Problems
    from corolla.tuning.initialize import InitSettings, initialize

    settings = InitSettings(family=family, hidden=hidden, layers=layers, heads=heads, vocabulary=vocabulary, context=context, seed=seed)
    console = Console(stderr=True)
    problems = Problems(tell=lambda text: console.print(text, markup=False, highlight=False))
    with console.status("training the tokenizer ..."):
        parameters = initialize(output, tokenizer_from, settings, problems, format=format)
    print(f"{output}: {family} of {parameters:,} parameters; train it with\n  corolla finetune {output} --data DATA --output DIR")
