"""How often does an answer depend on what else is computed? Greedy answers alone against the same ones packed together.

    python benchmarks/invariance.py [--model smollm2] [--answers 32] [--json FILE]

In bfloat16 a product's rounding depends on its number of rows, and a near tie may tip. The batch-invariant mode is exact by
fixed shapes; engine.py shows its cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from common import Table
from corolla.chat.templates import Turn, default_template, encode
from corolla.client.tokenizer import TextTokenizer
from corolla.models import catalog
from engine import load

FORMATS = ("fp32", "bf16", "bf16, batch-invariant", "int8")
QUESTIONS = ("What is {}?", "Tell me a short story about {}.", "Why do people care about {}?", "Give me three facts about {}.")
TOPICS = ("the moon", "bread", "bicycles", "honesty", "rivers", "the violin", "winter", "mathematics")


def prompts(directory: Path, count: int) -> list[list[int]]:
    """Questions in the model's own template."""
    tokenizer = TextTokenizer(directory)
    template = default_template(tokenizer)
    asked = [question.format(topic) for topic in TOPICS for question in QUESTIONS]
    return [encode(template, tokenizer, template.system, [Turn("user", question)]) for question in asked[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=catalog.DEFAULT, help="alias, directory or hub id")
    parser.add_argument("--answers", type=int, choices=range(2, 33), metavar="2..32", default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    directory = catalog.resolve(options.model)
    asked = prompts(directory, options.answers)
    table = Table("invariance", {key: value for key, value in vars(options).items() if key != "json"})
    for name in FORMATS:
        alone, packed = (load(directory, name, cache_tokens=options.answers * (options.tokens + 256)) for _ in range(2))
        together = packed.answers(asked, options.tokens)
        differ: list[float] = []
        for prompt, other in zip(asked, together, strict=True):
            single = alone.answer(prompt, options.tokens).token_ids
            same = [ours == theirs for ours, theirs in zip(single, other.token_ids, strict=True)]
            if not all(same):
                differ.append(same.index(False))
        bound: dict[str, Any] = {} if name in ("bf16", "int8") else {"reach": 0.0, "at_most": True}
        table.add(f"answers that differ, {name}", "%", [100 * len(differ) / len(asked)], **bound)
        if differ:
            table.add(f"tokens before they differ, {name}", "tokens", differ)
    table.report(options.json)


if __name__ == "__main__":
    main()
