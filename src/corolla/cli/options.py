"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corolla.cli.logs import LogLevel as Level
from corolla.cli.opening import SECRET_VARIABLE

SAMPLING = "Sampling"
MACHINE = "Machine"
SWARM = "Swarm"

Model = Annotated[str, typer.Argument(help="An alias (smollm2), a directory, or the id of a model on the hub.", show_default=True)]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens an answer may have.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the likeliest tokens of this total probability, (0, 1].", rich_help_panel=SAMPLING),
]
TopK = Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy, 1 the model's own variety; at most 2.", rich_help_panel=SAMPLING)]
RepetitionPenalty = Annotated[float | None, typer.Option(help="From 1 (none) to 2.", rich_help_panel=SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same answer.", rich_help_panel=SAMPLING)]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.", rich_help_panel=SAMPLING)]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; what this machine computes fast by default.", rich_help_panel=MACHINE)
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; the CPU by default.", rich_help_panel=MACHINE)]
TrainingDevice = Annotated[str | None, typer.Option("--device", help="cpu or cuda; the CPU by default.", rich_help_panel=MACHINE)]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads; all cores by default.", rich_help_panel=MACHINE)]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "--quant",
        help="packed (lossless), plain, or quantized while loading: int8, int4 or nf4; the quickest lossless by default.",
        rich_help_panel=MACHINE,
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(metavar="ADDRESS", help="Join the swarm through this address; may be repeated.", rich_help_panel=SWARM),
]
Secret = Annotated[
    str | None,
    typer.Option(
        help="What every peer of the swarm must know; without one it is open. Others see a command line: better set COROLLA_SECRET.",
        envvar=SECRET_VARIABLE,
        show_envvar=False,
        rich_help_panel=SWARM,
    ),
]
Host = Annotated[
    str,
    typer.Option(
        help="The address to listen at, IPv4, IPv6 or a name; 0.0.0.0 for all of this machine's IPv4, :: for all.", rich_help_panel=SWARM
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.", rich_help_panel=SWARM)]
IdentityFile = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="FILE",
        help="A key file that keeps the peer's id, and so its address; made where it is missing.",
        rich_help_panel=SWARM,
    ),
]
ReadyFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Gets the addresses, a line each, once others can join.")]
LogLevel = Annotated[
    Level,
    typer.Option(help="The least that is logged, on standard error: debug, info, warning or error.", show_choices=False, metavar="LEVEL"),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|NAME",
        help="A LoRA adapter for this model, as corolla finetune --lora and PEFT save it; with --peers also by its name or hash there.",
    ),
]
SOFT_PROMPT = "The directory of a soft prompt for this model, as corolla tune and PEFT save it."
Database = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        help="Where a gateway keeps keys and conversations: a file, or a URL as SQLAlchemy takes it; in your data directory by default.",
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant", help="Compute in fixed shapes: in bfloat16 too, no answer depends on others.", rich_help_panel=MACHINE
    ),
]

ANSWER_TIMEOUT = 600.0
"""The longest wait for one token of a model on this machine, in seconds: a long prompt on a slow processor takes minutes."""
