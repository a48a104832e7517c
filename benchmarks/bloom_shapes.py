"""BLOOM of the published shapes with random weights, one session: the engine beside stock transformers.

    python benchmarks/bloom_shapes.py [--shape 560m 3b] [--dtype float32] [--formats packed int4] [--device cuda] [--json FILE]

Weights are stored in float16, as BLOOM's are. Checkpoints, and quantized ones, are made in --keep, where they stay for the next run, or
in a temporary directory. What does not fit into the memory that is free is left out, which is said; what fits only alone is measured
alone, one after another instead of in turns. The last table has the form of the sft-chat card's: a row for each shape.
"""

from __future__ import annotations

import argparse
import functools
import gc
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from bloom_checkpoint import SHAPES, checkpoint_bytes, make_checkpoint
from common import Table, rounds
from corolla.models.quantization import quantize_model
from corolla.models.span import load_span
from runners import Corolla, Runner, Transformers, decode_rate

FULL_VOCABULARY = 250_880
PROMPT, NEW_TOKENS, PREFILL = 16, 32, 256
STOCK = "transformers"
_ROOM = 0.9  # of the memory that is free
# Bytes of a weight inside blocks, and outside them, as the engine keeps them with each format; scales included.
_BYTES = {"int8": (1.0, 2.0), "int4": (0.75, 2.0), "nf4": (0.57, 2.0)}


def decode(runner: Runner, prompt: Callable[[int], list[int]], name: str, _round: int) -> Mapping[str, float]:
    return {f"decode, {name}": decode_rate([runner.answer(prompt(PROMPT), NEW_TOKENS)])}


def prefill(runner: Runner, prompt: Callable[[int], list[int]], name: str, _round: int) -> Mapping[str, float]:
    return {f"prefill, {name}": PREFILL / runner.answer(prompt(PREFILL), 1).first_token_s}


def load(name: Any, directory: Path, options: argparse.Namespace) -> Runner:
    if name == STOCK:
        return Transformers(directory, dtype=options.dtype, device=options.device)
    quantized = directory.with_name(f"{directory.name}-{name}")
    if name in _BYTES and not quantized.exists():
        quantize_model(directory, quantized, name)
    source = quantized if name in _BYTES else directory
    return Corolla(load_span(source, dtype=options.dtype, device=options.device, weights=name), cache_tokens=1024)


def memory(name: str, shape: str, options: argparse.Namespace) -> float:
    """Bytes that a model takes, about; while it is loaded one block more, and the embedding twice."""
    whole, ends = checkpoint_bytes(shape, options.vocabulary), 2 * SHAPES[shape][0] * options.vocabulary
    wide = 4 if options.dtype == "float32" else 2
    inside, outside = _BYTES.get(name, (wide, wide))
    # The engine keeps the embedding as it is stored, and the head beside it.
    return (whole - ends) / 2 * inside + ends / 2 * outside * (1 if name == STOCK else 2) + 0.5e9


def measure(shape: str, directory: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Figures by name, of the ways that fit."""
    make_checkpoint(directory, shape, options.vocabulary)
    generator = random.Random(0)

    def prompt(count: int) -> list[int]:
        return [generator.randrange(options.vocabulary) for _ in range(count)]

    def cells(runners: Mapping[str, Runner]) -> dict[str, Callable[[int], Mapping[str, float]]]:
        return {
            f"{shape}: {work.__name__}, {name}": functools.partial(work, runner, prompt, name)
            for work in (decode, prefill)
            for name, runner in runners.items()
        }

    names = [*([] if options.alone else [STOCK]), *options.formats]
    room = psutil.virtual_memory().available * _ROOM if options.device == "cpu" else float("inf")
    needs = {name: memory(name, shape, options) for name in names}
    if sum(needs.values()) < room:
        return rounds(options.repeats, cells({name: load(name, directory, options) for name in names}))
    figures: dict[str, list[float]] = {}
    for name in names:
        if needs[name] > room:
            print(f"{shape}, {name}: takes {needs[name] / 1e9:.1f} GB and {room / 1e9:.1f} are free: left out", file=sys.stderr)
            continue
        figures |= rounds(options.repeats, cells({name: load(name, directory, options)}))
        gc.collect()
    return figures


def label(name: str, options: argparse.Namespace) -> str:
    if name == STOCK:
        return f"transformers, {options.dtype}"
    return f"corolla, {options.dtype}" if name in ("packed", "plain") else f"corolla, {name}"


def fill(table: Table, shape: str, figures: Mapping[str, list[float]], options: argparse.Namespace) -> None:
    for work in ("decode", "prefill"):
        what = "decode, 1 session" if work == "decode" else f"prefill, {PREFILL} tokens"
        for name in (STOCK, *options.formats):
            if (values := figures.get(f"{work}, {name}")) is not None:
                table.add(f"{shape}: {what}, {label(name, options)}", "tokens/s", values)
        for name in options.formats:
            ours, theirs = figures.get(f"{work}, {name}"), figures.get(f"{work}, {STOCK}")
            if ours is not None and theirs is not None:
                lossless = shape == "560m" and name == "packed" and options.dtype == "float32" and work == "decode"
                bounds: dict[str, Any] = {"reach": 1.6, "aim": 2.2} if lossless else {}
                table.ratio(f"{shape}: {work}, {label(name, options)} / transformers", "x", ours, theirs, **bounds)
    table.add(f"{shape}: weights as stored", "GB", [checkpoint_bytes(shape, options.vocabulary) / 1e9])


def summary(found: Mapping[str, Mapping[str, list[float]]], options: argparse.Namespace) -> str:
    """Tokens a second by shape, as Markdown."""
    names = [name for name in (STOCK, *options.formats) if any(f"decode, {name}" in figures for figures in found.values())]
    lines = ["| model | " + " | ".join(label(name, options) for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for shape, figures in found.items():
        rates = [sorted(figures.get(f"decode, {name}", ())) for name in names]
        lines.append(f"| BLOOM {shape} | " + " | ".join(f"{each[len(each) // 2]:.1f}" if each else "-" for each in rates) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["560m"])
    parser.add_argument("--vocabulary", type=int, default=32_000, help=f"BLOOM's own is {FULL_VOCABULARY:,}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--formats", nargs="+", choices=("packed", "plain", "int8", "int4", "nf4"), help="packed, or plain on a GPU")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for both sides")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the checkpoints there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()
    options.formats = options.formats or ["packed" if options.device == "cpu" else "plain"]

    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    table = Table("bloom_shapes", {key: value for key, value in vars(options).items() if key not in ("json", "keep")})
    found = {}
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as temporary:
            found[shape] = measure(shape, (options.keep or Path(temporary)) / f"{shape}-{options.vocabulary}", options)
        fill(table, shape, found[shape], options)
    table.report(options.json)
    print(f"\ntokens/s, one session\n\n{summary(found, options)}")


if __name__ == "__main__":
    main()
