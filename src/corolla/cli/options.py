"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from corolla.cli.logs import LogLevel as Level

_SAMPLING = "Sampling"
_MACHINE = "Machine"
_SWARM = "Swarm"

Model = Annotated[str, typer.Argument(help="An alias (smollm2), a directory, or the id of a model on the hub.", show_default=True)]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens an answer may have.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the likeliest tokens of this total probability, (0, 1].", rich_help_panel=_SAMPLING),
]
TopK = Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; up to 1 the more varied.", rich_help_panel=_SAMPLING)]
RepetitionPenalty = Annotated[float | None, typer.Option(help="From 1 (none) to 2.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same answer.", rich_help_panel=_SAMPLING)]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.", rich_help_panel=_SAMPLING)]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; what this machine computes fast by default.", rich_help_panel=_MACHINE)
]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads; all cores by default.", rich_help_panel=_MACHINE)]
Weights = Annotated[
    str | None, typer.Option(help="packed (lossless), plain, int8 or int4; the quickest lossless by default.", rich_help_panel=_MACHINE)
]
Peers = Annotated[
    list[str] | None,
    typer.Option(metavar="ADDRESS", help="Join the swarm through this address; may be repeated.", rich_help_panel=_SWARM),
]
Secret = Annotated[
    str | None,
    typer.Option(
        help="What every peer of the swarm must know; without one it is open. Others see a command line: better set COROLLA_SECRET.",
        envvar="COROLLA_SECRET",
        show_envvar=False,
        rich_help_panel=_SWARM,
    ),
]
LogLevel = Annotated[
    Level,
    typer.Option(help="The least that is logged, on standard error: debug, info, warning or error.", show_choices=False, metavar="LEVEL"),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant", help="Compute in fixed shapes: in bfloat16 too, no answer depends on others.", rich_help_panel=_MACHINE
    ),
]

ANSWER_TIMEOUT = 600.0
"""The longest wait for one token of a model on this machine, in seconds: a long prompt on a slow processor takes minutes."""
