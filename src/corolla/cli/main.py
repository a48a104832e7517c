"""The `corolla` command: its subcommands, and what an error looks like."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import corolla
from corolla.cli.batch import batch
from corolla.cli.bootstrap import bootstrap
from corolla.cli.chat import chat
from corolla.cli.doctor import doctor
from corolla.cli.evaluate import evaluate
from corolla.cli.finetune import finetune
from corolla.cli.gateway import gateway
from corolla.cli.generate import generate
from corolla.cli.init import init
from corolla.cli.keys import keys
from corolla.cli.models import models
from corolla.cli.prepare import prepare
from corolla.cli.quantize import quantize
from corolla.cli.serve import serve
from corolla.cli.status import status
from corolla.cli.tune import tune
from corolla.cli.up import up
from corolla.errors import CorollaError

# oneDNN compiles a kernel for each number of rows, and PyTorch and it keep 1,024 of them each. Calls of 400 different lengths through a
# model of four tiny blocks made a process grow by 470 MB; with 128 it is 70 MB, and answers come as quickly. Read when torch is loaded.
_KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


class _Commands(TyperGroup):
    """Every command's errors are one line, with exit code 2; an interruption is exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        for name, kept in _KERNELS_KEPT.items():
            os.environ.setdefault(name, kept)
        try:
            return super().invoke(ctx)
        except CorollaError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    name="corolla",
    cls=_Commands,
    help="Run a large language model on this machine, or on a swarm of ordinary ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which joins the lines of a paragraph
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"corolla {corolla.__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False) -> None:
    # Bytes that are no text reach the commands, which name them, and characters that a terminal lacks do not end a command.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


for command in (
    chat,
    generate,
    batch,
    up,
    gateway,
    serve,
    bootstrap,
    status,
    models,
    doctor,
    prepare,
    tune,
    finetune,
    init,
    evaluate,
    quantize,
):
    app.command()(command)
app.add_typer(keys, name="keys")
