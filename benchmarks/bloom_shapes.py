"""BLOOM of the published shapes with random weights, one session: the engine beside stock transformers.

    python benchmarks/bloom_shapes.py [--shape 560m] [--dtype float32] [--device cuda] [--json FILE]

The checkpoint is made in a temporary directory and removed at the end.
"""

from __future__ import annotations

import argparse
import functools
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers

from common import Table, rounds
from corolla.models.span import load_span
from runners import Corolla, Runner, Transformers, decode_rate, median_gap_ms

# hidden, blocks, heads
SHAPES = {"560m": (1024, 24, 16), "3b": (2560, 30, 32), "7b1": (4096, 30, 32)}
FULL_VOCABULARY = 250_880
PROMPT, NEW_TOKENS, PREFILL = 16, 32, 256


def make_checkpoint(directory: Path, shape: str, vocabulary: int, dtype: str) -> int:
    """Random weights as safetensors; returns their bytes, all of which a token reads (embedding and head are one)."""
    hidden, blocks, heads = SHAPES[shape]
    config = transformers.BloomConfig(
        vocab_size=vocabulary, hidden_size=hidden, n_layer=blocks, n_head=heads, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = transformers.BloomForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    return sum(parameter.nbytes for parameter in model.parameters())


def decode(runner: Runner, prompt: Callable[[int], list[int]], name: str, _round: int) -> Mapping[str, float]:
    answer = runner.answer(prompt(PROMPT), NEW_TOKENS)
    return {f"decode, {name}": decode_rate([answer]), f"step, {name}": median_gap_ms(answer)}


def prefill(runner: Runner, prompt: Callable[[int], list[int]], name: str, _round: int) -> Mapping[str, float]:
    return {f"prefill, {name}": PREFILL / runner.answer(prompt(PREFILL), 1).first_token_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="560m")
    parser.add_argument("--vocabulary", type=int, default=32_000, help=f"BLOOM's own is {FULL_VOCABULARY:,}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for both sides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        nbytes = make_checkpoint(Path(temporary), options.shape, options.vocabulary, options.dtype)
        model = load_span(
            Path(temporary), dtype=options.dtype, device=options.device, weights="packed" if options.device == "cpu" else "plain"
        )
        runners: dict[str, Runner] = {
            "transformers": Transformers(Path(temporary), dtype=options.dtype, device=options.device),
            "corolla": Corolla(model),
        }
    generator = random.Random(0)

    def prompt(count: int) -> list[int]:
        return [generator.randrange(options.vocabulary) for _ in range(count)]

    cells: dict[str, Callable[[int], Mapping[str, float]]] = {}
    for work in (decode, prefill):
        for name, runner in runners.items():
            cells[f"{work.__name__}, {name}"] = functools.partial(work, runner, prompt, name)
    figures = rounds(options.repeats, cells)

    settings = {key: value for key, value in vars(options).items() if key != "json"}
    table = Table("bloom_shapes", settings)
    for name in runners:
        table.add(f"decode, 1 session, {name}", "tokens/s", figures[f"decode, {name}"])
    for name in runners:
        table.add(f"prefill, {PREFILL} tokens, {name}", "tokens/s", figures[f"prefill, {name}"])
    table.add("weights", "GB", [nbytes / 1e9])
    table.add("weights read, corolla", "GB/s", [nbytes / 1e6 / step for step in figures["step, corolla"]])
    goal = {"reach": 1.6, "aim": 2.2} if options.shape == "560m" and options.dtype == "float32" and options.device == "cpu" else {}
    table.ratio("decode: corolla / transformers", "x", figures["decode, corolla"], figures["decode, transformers"], **goal)
    table.ratio("prefill: corolla / transformers", "x", figures["prefill, corolla"], figures["prefill, transformers"])
    table.report(options.json)


if __name__ == "__main__":
    main()
