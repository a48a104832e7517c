"""`corolla quantize`: a model's matrices in 8 or 4 bits, as a directory."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli import options
from corolla.cli.progress import showing_progress


class Format(Enum):
    """`models.quantized.QuantizedFormat`, for the command line."""

    NF4 = "nf4"
    INT8 = "int8"
    INT4 = "int4"


def quantize(
    model: options.Model,
    to: Annotated[
        Format, typer.Option(help="nf4 (bitsandbytes, for transformers too), int8 or int4.", metavar="FORMAT", show_choices=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new directory.")],
) -> None:
    """Write a quantized copy of a model.

    The blocks' matrices become nf4, int8 or int4; norms, biases and embeddings stay. Every command takes the new directory as it takes
    any model's; servers of it say so in their records, and no route mixes them with others. One block is in memory at a time.
    A server can also quantize while it loads, without a copy: `corolla serve MODEL --quant nf4`.

    Example: corolla quantize smollm2 --to nf4 --output smollm2-nf4
    """
    from corolla.models.catalog import resolve
    from corolla.models.quantization import quantize_model

    with showing_progress() as progress:
        source = resolve(model, progress=progress)
        nbytes = quantize_model(source, output, to.value, lambda done, total: progress("quantizing", done, total))
    print(f"{nbytes / 1e6:.0f} MB of tensors", file=sys.stderr)
    print(output)
