"""What each way of keeping weights costs and gives, beside bfloat16.

    python benchmarks/quantization.py [--model smollm2] [--data FILE] [--tokens N] [--repeats N] [--json FILE]

Size is that of the directory's tensors (`corolla quantize` writes one for each way), memory what loading and answering add to a new
process, at the end and at its highest: pages of files that are read in place are among them, and the system may take those back. KL is the
mean Kullback-Leibler divergence of the next-token distributions from bfloat16's, perplexity is on the same held-out text: --data's answers
in any format of docs/data.md, or a passage of the benchmark's own.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from common import Table, rounds
from corolla.client.tokenizer import TextTokenizer
from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.models import catalog
from corolla.models.checkpoint import Checkpoint
from corolla.models.linear import WeightFormat
from corolla.models.quantization import quantize_model
from corolla.models.span import SpanModel, load_span
from engine import PASSAGE, logits
from runners import Corolla, decode_rate
from tuning_peer import resident

FORMATS: dict[str, WeightFormat] = {"bf16, plain": "plain", "bf16": "packed", "int8": "int8", "int4": "int4", "nf4": "nf4"}
QUANTIZED = ("int8", "int4", "nf4")
WINDOW = 512  # tokens of the text at a time
PROMPT, PREFILL = 16, 128
# The figure that each is to reach; nf4 is what bitsandbytes makes it.
LIMITS = {"int8": 0.01, "int4": 0.02}


def memory_of(source: Path, weights: WeightFormat) -> tuple[float, float]:
    """MB that a process of its own comes to hold by loading a model and answering, at the end and at its highest."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_weigh, source, weights).result()


def _weigh(source: Path, weights: WeightFormat) -> tuple[float, float]:
    before = resident()
    model = load_span(source, dtype="bfloat16", weights=weights)
    Corolla(model).answer(list(range(PROMPT)), 4)
    highest = resident(highest=True)
    return (resident() - before) / 1e6, (highest - before) / 1e6


def held_out(model: SpanModel, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of what follows each token, window by window."""
    windows = [token_ids[start : start + WINDOW] for start in range(0, len(token_ids), WINDOW)]
    return torch.cat([logits(model, window).log_softmax(-1)[:-1] for window in windows if len(window) > 1])


def following(token_ids: list[int]) -> torch.Tensor:
    windows = [token_ids[start : start + WINDOW] for start in range(0, len(token_ids), WINDOW)]
    return torch.tensor([token for window in windows for token in window[1:]])


def text_of(data: Path | None, least: int) -> str:
    """The first answers of `data`, of `least` characters together."""
    if data is None:
        return PASSAGE
    text = ""
    for example in read(str(data), Problems()):
        text += "\n\n".join(turn.content for turn in example.turns if turn.role == "assistant") + "\n\n"
        if len(text) >= least:
            break
    return text


def tensor_bytes(directory: Path) -> int:
    with Checkpoint(directory) as checkpoint:
        return sum(checkpoint.nbytes(name) for name in checkpoint.names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, help="held-out dialogues; a passage of its own by default")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text at most")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    directory = catalog.resolve(arguments.model)
    text = TextTokenizer(directory).encode(text_of(arguments.data, 8 * arguments.tokens))[: arguments.tokens]
    models, memory, size = {}, {}, dict.fromkeys(FORMATS, tensor_bytes(directory) / 1e6)
    with tempfile.TemporaryDirectory() as temporary:
        for name, weights in FORMATS.items():
            source = directory
            if name in QUANTIZED:
                source = Path(temporary) / name
                size[name] = quantize_model(directory, source, weights) / 1e6  # type: ignore[arg-type]
            memory[name] = memory_of(source, weights)
            models[name] = load_span(source, dtype="bfloat16", weights=weights)

        def decode(name: str, _round: int) -> Mapping[str, float]:
            return {name: decode_rate([Corolla(models[name]).answer(text[:PROMPT], arguments.new_tokens)])}

        def prefill(name: str, _round: int) -> Mapping[str, float]:
            return {f"{name}, prefill": PREFILL / Corolla(models[name]).answer(text[:PREFILL], 1).first_token_s}

        cells: dict[str, Callable[[int], Mapping[str, float]]] = {}
        for name in FORMATS:
            cells |= {name: functools.partial(decode, name), f"{name}, prefill": functools.partial(prefill, name)}
        figures = rounds(arguments.repeats, cells)

        reference, targets = held_out(models["bf16, plain"], text), following(text)
        settings = {"model": arguments.model, "tokens of text": len(text), "threads": torch.get_num_threads()}
        table = Table("quantization", settings)
        for name in FORMATS:
            probabilities = reference if name == "bf16, plain" else held_out(models[name], text)
            divergence = torch.nn.functional.kl_div(probabilities, reference, reduction="batchmean", log_target=True)
            table.add(f"{name}: size", "MB", [size[name]])
            table.add(f"{name}: memory", "MB", [memory[name][0]])
            table.add(f"{name}: memory at its highest", "MB", [memory[name][1]])
            table.add(f"{name}: 1 session", "tokens/s", figures[name])
            table.add(f"{name}: prefill of {PREFILL}", "tokens/s", figures[f"{name}, prefill"])
            if name in QUANTIZED:
                table.ratio(f"{name} / bf16", "x", figures[name], figures["bf16"], reach=1.3)
            bounds = {"reach": LIMITS[name], "at_most": True} if name in LIMITS else {}
            table.add(f"{name}: KL from bf16", "nats/token", [float(divergence)], **bounds)
            table.add(f"{name}: perplexity", "", [math.exp(-float(probabilities.gather(1, targets[:, None]).mean()))])
    table.report(arguments.json)


if __name__ == "__main__":
    main()
