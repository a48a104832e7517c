"""`corolla finetune`: a model trained further by a recipe."""

from __future__ import annotations

import logging
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corolla.cli import logs, options
from corolla.cli.logs import LogLevel

if TYPE_CHECKING:
    from corolla.tuning.run_record import RunRecord

_RECIPE, _RUN, _LORA = "What is learned", "The run", "LoRA"


def _show_recipe(name: str | None) -> None:
    if name is not None:
        from corolla.tuning.recipe import load_recipe

        print(load_recipe(name).dump(), end="")
        raise typer.Exit


def finetune(
    model: options.Model,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="Dialogues (a file, a directory, a dataset of the hub) or what corolla prepare made; may be repeated. "
            "2=SOURCE is for the second phase, fr=SOURCE the share fr.",
            rich_help_panel=_RECIPE,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the model goes.", rich_help_panel=_RUN)],
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="chat, sft-chat, bloomchat, tiny-chat, or a file.", rich_help_panel=_RECIPE)
    ] = "chat",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; may be repeated.", rich_help_panel=_RECIPE),
    ] = None,
    show_recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            callback=_show_recipe,
            is_eager=True,
            help="Print a whole recipe, to save and change.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train low-rank factors, saved as an adapter of PEFT.", rich_help_panel=_LORA)
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="Their rank.", rich_help_panel=_LORA)] = 16,
    lora_alpha: Annotated[int, typer.Option(help="Their scale, times the rank.", rich_help_panel=_LORA)] = 32,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Sequences computed at a time on each device; a step's are the recipe's.", rich_help_panel=_RUN),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, for a third more time.", rich_help_panel=_RUN)
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.", rich_help_panel=_RUN)] = False,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between two evaluations and checkpoints; ten a phase by default.", rich_help_panel=_RUN)
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="trackio or tensorboard (files of this machine), wandb (a service) or none.", rich_help_panel=_RUN)
    ] = "none",
    device: options.TrainingDevice = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Of the result, as the hub writes it: apache-2.0.", rich_help_panel=_RUN)
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of the data; recognized by default.", rich_help_panel=_RECIPE)] = None,
    split: Annotated[str, typer.Option(help="The part of a dataset, or of a JSON object.", rich_help_panel=_RECIPE)] = "train",
    no_memory_check: Annotated[
        bool, typer.Option("--no-memory-check", help="Begin even if it seems not to fit.", rich_help_panel=_RUN)
    ] = False,
    threads: options.Threads = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Train a model further on dialogues, by a recipe.

    The result is a model's directory as transformers has them, with its model card, the whole recipe and the run's figures; the
    best weights on held-out dialogues are kept. Ctrl-C saves; --resume goes on. Several devices:
    `accelerate launch --no_python corolla finetune ...`

    Example: `corolla finetune smollm2 --data dialogues.jsonl --output my-chat`
    """
    logs.set_up(log_level, swarm=False)
    # accelerate imports it wherever it is installed; that it has no quick 4-bit kernel concerns nobody here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    from corolla.tuning.recipe import load_recipe

    chosen = load_recipe(recipe, changes or ())
    import torch
    from rich.console import Console

    from corolla.cli.progress import showing_progress
    from corolla.tuning import finetune as tuning
    from corolla.tuning.finetune_run import TRAINING

    if threads is not None:
        torch.set_num_threads(threads)
    settings = tuning.FinetuneSettings(
        lora=lora,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        evaluate_every=evaluate_every,
        report_to=report_to,
        device=device,  # type: ignore[arg-type]  # it is checked there
        licence=licence,
        check_memory=not no_memory_check,
    )
    console = Console(stderr=True)
    try:
        # What reports a run prints to standard output, where only the result belongs.
        with showing_progress() as progress, redirect_stdout(sys.stderr):
            record = tuning.finetune(
                model, data, output, chosen, settings, console, format=format, split=split, resume=resume, progress=progress
            )
    except KeyboardInterrupt:
        arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
        said = (
            f"what is trained is saved in {output / TRAINING}"
            if any((output / TRAINING).glob("*/checkpoint-*"))
            else "nothing is saved yet"
        )
        print(f"interrupted: {said}; go on with\n  {shlex.join(['corolla', *arguments, '--resume'])}", file=sys.stderr)
        raise typer.Exit(130) from None
    if record.written:
        _show(record, model, output, lora)


def _show(record: RunRecord, model: str, output: Path, lora: bool) -> None:
    """The result, and how to go on."""
    if (before := record.base) and (after := record.final):
        print(
            f"held-out loss {before['loss']:.3f} before, {after['loss']:.3f} after "
            f"(perplexity {before['perplexity']:.1f}, {after['perplexity']:.1f})"
        )
    print(f"{output}: talk with it by\n  corolla chat {f'{model} --adapter {output}' if lora else output}")
