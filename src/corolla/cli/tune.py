"""`corolla tune`: a soft prompt trained from dialogues."""

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

_DATA, _TRAINING, _RUN = "Data", "Training", "The run"


def tune(
    model: options.Model,
    data: Annotated[str, typer.Option(help="Dialogues: a file, a directory of files, or a dataset of the hub.", rich_help_panel=_DATA)],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the prompt goes; MODEL-prompt by default.", rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.", rich_help_panel=_RUN)] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Soft tokens at every block, not only in front.", rich_help_panel=_TRAINING)] = False,
    prompt_tokens: Annotated[int, typer.Option(help="Soft tokens.", rich_help_panel=_TRAINING)] = 16,
    batch: Annotated[int, typer.Option(help="Dialogues a step.", rich_help_panel=_TRAINING)] = 8,
    epochs: Annotated[float, typer.Option(help="How often each dialogue is seen.", rich_help_panel=_TRAINING)] = 1.0,
    steps: Annotated[int | None, typer.Option(help="How many steps, in place of --epochs.", rich_help_panel=_TRAINING)] = None,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; it falls linearly to 0.", rich_help_panel=_TRAINING)] = 1e-2,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=_TRAINING)] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides the first prompt, the held-out part and the order.", rich_help_panel=_TRAINING)] = 0,
    format: Annotated[str | None, typer.Option(help="Of the data; recognized by default.", rich_help_panel=_DATA)] = None,
    split: Annotated[str, typer.Option(help="The part of a dataset, or of a JSON object.", rich_help_panel=_DATA)] = "train",
    template: Annotated[
        str | None,
        typer.Option(help="tokenizer, bloomchat, sft-chat, petals or plain; the model's own by default.", rich_help_panel=_DATA),
    ] = None,
    loss: Annotated[str, typer.Option(help="answers trains on replies only, all on everything.", rich_help_panel=_DATA)] = "answers",
    history: Annotated[
        int | None, typer.Option(help="Each reply by itself, after so many turns; whole dialogues by default.", rich_help_panel=_DATA)
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; a longer one is cut.", rich_help_panel=_DATA)] = 256,
    truncation: Annotated[
        str, typer.Option(help="Which end of a longer one goes, right or left, or drop.", rich_help_panel=_DATA)
    ] = "right",
    samples: Annotated[
        int | None, typer.Option(help="So many dialogues, drawn by the seed; all by default.", rich_help_panel=_DATA)
    ] = None,
    held_out: Annotated[float, typer.Option(help="The share of the dialogues that measures perplexity.", rich_help_panel=_DATA)] = 0.05,
    held_out_samples: Annotated[int, typer.Option(help="The most dialogues that measure it.", rich_help_panel=_DATA)] = 50,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints.", rich_help_panel=_RUN)] = 50,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between two perplexities; before and after by default.", rich_help_panel=_RUN)
    ] = None,
    report_to: Annotated[
        str,
        typer.Option(help="trackio or tensorboard (files of this machine), wandb (a service) or none.", rich_help_panel=_RUN),
    ] = "trackio",
    dtype: options.Dtype = None,
    device: options.TrainingDevice = None,
    threads: options.Threads = None,
    peers: options.Peers = None,
    secret: options.Secret = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Train a soft prompt from dialogues.

    The model stays as it is, in this process or, with --peers, at the servers of a swarm; a few embeddings in front of every
    conversation are trained. They are saved as PEFT saves them, and `corolla chat MODEL --prompt DIR` talks with them. Ctrl-C saves;
    --resume goes on.

    Example: `corolla tune smollm2 --data personachat.txt --samples 500 --output persona`
    """
    logs.set_up(log_level, swarm=bool(peers))
    # accelerate imports it wherever it is installed; that it has no quick 4-bit kernel concerns nobody here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    import torch
    from rich.console import Console

    from corolla.cli.addresses import check_addresses
    from corolla.cli.progress import showing_progress
    from corolla.server.embedded import fast_dtype
    from corolla.tuning import prompt_tuning
    from corolla.tuning.checkpoints import last_checkpoint
    from corolla.tuning.dialogues import DataSettings

    if threads is not None:
        torch.set_num_threads(threads)
    read = DataSettings(
        data=data,
        format=format,
        split=split,
        loss=loss,  # type: ignore[arg-type]  # it is checked there
        history=history,
        max_length=max_length,
        truncation=truncation,  # type: ignore[arg-type]
        samples=samples,
        held_out=held_out,
        held_out_samples=held_out_samples,
        seed=seed,
    )
    settings = prompt_tuning.TuneSettings(
        mode="deep_ptune" if deep else "ptune",
        prompt_tokens=prompt_tokens,
        batch=batch,
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        save_every=save_every,
        evaluate_every=evaluate_every,
        report_to=report_to,
        dtype=dtype or fast_dtype(device or "cpu"),
        device=device,
        template=template,
    )
    output = output or Path(f"{Path(model).name}-prompt")
    addresses = check_addresses(peers) if peers else []
    console = Console(stderr=True)
    try:
        # What reports a run prints to standard output, where only the result belongs.
        with showing_progress() as progress, redirect_stdout(sys.stderr):
            record = prompt_tuning.tune(
                model, output, read, settings, console, peers=addresses, secret=secret, resume=resume, progress=progress
            )
    except KeyboardInterrupt:
        saved = last_checkpoint(output)
        arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
        again = shlex.join(["corolla", *arguments, "--resume"])
        step = f"step {saved.name.rpartition('-')[2]} is saved in {output}" if saved else "no step is saved yet"
        print(f"interrupted: {step}; go on with\n  {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    _show(record, model, output, template, peers or [])


def _show(record: RunRecord, model: str, output: Path, template: str | None, peers: list[str]) -> None:
    """The result, and how to go on."""
    for sample in record.samples[:1]:
        said = [(turn["role"], turn["content"]) for turn in sample["conversation"]]
        replies = [("before", sample["before"]), ("after", sample["after"]), ("the data's", sample["reference"])]
        for who, what in [("system", sample["system"]), *said, *replies]:
            if what:
                print(f"{who + ':':<12}{what}")
        print()
    if record.base and record.evaluations:
        last = record.evaluations[-1]
        before, after = record.base["perplexity"], last["perplexity"]
        print(f"perplexity of {last['tokens']} held-out tokens: {before:.2f} without the prompt, {after:.2f} with it")
    command = ["corolla", "chat", model, "--prompt", str(output)]
    command += ["--template", template] if template else []
    command += [part for peer in peers for part in ("--peers", peer)]
    if record.samples and record.samples[0]["system"]:
        command += ["--system", record.samples[0]["system"]]
    print(f"saved in {output}; talk with it:\n  {shlex.join(command)}")
