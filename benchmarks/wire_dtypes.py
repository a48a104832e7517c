"""What the dtype of hidden states between servers does to answers: the same model, whole and cut in pieces.

    python benchmarks/wire_dtypes.py [--model smollm2] [--dtype float32] [--servers 4] [--json FILE]

The text is this project's own documentation. Between two pieces the rows go through `swarm.arrays`, as between servers.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from typing import get_args

import torch

from common import Table
from corolla.client.tokenizer import TextTokenizer
from corolla.engine.calls import CallSequences, forward
from corolla.messages import WireDtype
from corolla.models import catalog
from corolla.models.span import SpanModel, load_span
from corolla.swarm.arrays import from_array, to_array
from corolla.types import Span

TEXTS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


def sequences(directory: Path, count: int, length: int) -> list[list[int]]:
    """Pieces of the documentation, evenly from all of it."""
    tokenizer = TextTokenizer(directory)
    tokens = [token for text in TEXTS for token in tokenizer.encode(text.read_text(encoding="utf-8"))]
    starts = [(len(tokens) - length) * index // max(1, count - 1) for index in range(count)]
    return [tokens[start : start + length] for start in starts]


def through(model: SpanModel, cuts: list[int], tokens: list[int], dtype: WireDtype | None) -> tuple[torch.Tensor, int]:
    """Logits [tokens, vocabulary] with the rows in `dtype` between pieces (as they are where None), and the bytes of one crossing."""
    hidden = model.embed(torch.tensor(tokens))
    crossing = 0
    for start, end in pairwise(cuts):
        hidden = run(forward(model, CallSequences(Span(start, end), (len(tokens),), hidden)))
        if dtype is not None and end != cuts[-1]:
            array = to_array(hidden, dtype)
            crossing, hidden = array.nbytes, from_array(array).to(model.dtype)
    return model.logits(hidden).float(), crossing


def run(call: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    while True:
        try:
            next(call)
        except StopIteration as done:
            result: torch.Tensor = done.value
            return result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=catalog.DEFAULT, help="alias, directory or hub id")
    parser.add_argument("--dtype", default="float32", help="that the servers compute in")
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()

    directory = catalog.resolve(options.model)
    model = load_span(directory, dtype=options.dtype)
    cuts = [model.arch.blocks * index // options.servers for index in range(options.servers + 1)]
    table = Table("wire dtypes", {key: value for key, value in vars(options).items() if key != "json"})
    texts = sequences(directory, options.sequences, options.length)
    whole = [through(model, cuts, tokens, None)[0].log_softmax(-1) for tokens in texts]
    for dtype in get_args(WireDtype):
        divergences, agreements, losses, crossing = [], [], [], 0
        for tokens, expected in zip(texts, whole, strict=True):
            logits, crossing = through(model, cuts, tokens, dtype)
            found = logits.log_softmax(-1)
            divergences.append(float(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean")))
            agreements.append(100 * float((found.argmax(-1) == expected.argmax(-1)).float().mean()))
            following = torch.tensor(tokens[1:])
            losses.append(
                float(torch.nn.functional.nll_loss(found[:-1], following) - torch.nn.functional.nll_loss(expected[:-1], following))
            )
        table.add(f"KL to whole, {dtype}", "nats", divergences)
        table.add(f"same likeliest token, {dtype}", "%", agreements)
        table.add(f"loss more than whole, {dtype}", "nats", losses)
        table.add(f"bytes of a row / (2 * hidden), {dtype}", "x", [crossing / options.length / (2 * model.arch.hidden)])
    table.report(options.json)


if __name__ == "__main__":
    main()
