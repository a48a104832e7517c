"""What each way of keeping weights costs and gives, beside bfloat16.

    python benchmarks/quantization.py [--model smollm2] [--text FILE] [--tokens N] [--repeats N] [--json FILE]

KL is the mean Kullback-Leibler divergence of the next-token distributions from bfloat16's on the text, perplexity is on the same text.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from common import Table, resident_bytes, rounds
from corolla.client.tokenizer import TextTokenizer
from corolla.models import catalog
from corolla.models.linear import WeightFormat
from corolla.models.span import SpanModel, load_span
from engine import PASSAGE, divergence, logits
from runners import Corolla, decode_rate

FORMATS: tuple[WeightFormat, ...] = ("packed", "int8", "int4", "nf4")


def perplexity(model: SpanModel, token_ids: list[int]) -> float:
    predicted = logits(model, token_ids)[:-1].log_softmax(-1)
    return math.exp(-float(predicted.gather(1, torch.tensor(token_ids[1:])[:, None]).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="held-out text; a passage of its own by default")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text at most")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    directory = catalog.resolve(arguments.model)
    text = PASSAGE if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    passage = TextTokenizer(directory).encode(text)[: arguments.tokens]
    models, memory = {}, {}
    for name in FORMATS:
        gc.collect()
        before = resident_bytes()
        models[name] = load_span(directory, dtype="bfloat16", weights=name)
        memory[name] = (resident_bytes() - before) / 1e6

    def decode(name: WeightFormat, _round: int) -> Mapping[str, float]:
        return {name: decode_rate([Corolla(models[name]).answer(passage[:16], arguments.new_tokens)])}

    cells: dict[str, Callable[[int], Mapping[str, float]]] = {name: functools.partial(decode, name) for name in FORMATS}
    figures = rounds(arguments.repeats, cells)
    table = Table("quantization", {"model": arguments.model, "tokens of text": len(passage), "threads": torch.get_num_threads()})
    for name in FORMATS:
        label = "bfloat16" if name == "packed" else name
        table.add(f"{label}, memory", "MB", [memory[name]])
        table.add(f"{label}, 1 session", "tokens/s", figures[name])
        table.add(f"{label}, perplexity", "", [perplexity(models[name], passage)])
        if name != "packed":
            limits = {"int8": 0.01, "int4": 0.02}
            bounds = {"reach": limits[name], "at_most": True} if name in limits else {}
            table.add(f"{label}, KL from bfloat16", "nats/token", [divergence(models["packed"], models[name], passage)], **bounds)
            table.ratio(f"{label} / bfloat16", "x", figures[name], figures["packed"], reach=1.3)
    table.report(arguments.json)


if __name__ == "__main__":
    main()
