"""Sequence classification: a soft prompt and a classifier's head trained through remote blocks, on sentences as in SST-2.

    python examples/classification_sst2.py
    python examples/classification_sst2.py --model bigscience/bloom-560m --peers /ip4/.../p2p/... --data sst2_train.tsv

The data is a file of lines `label<TAB>sentence`, labels from 0 on; eighty sentences about films lie beside this script. Every fifth
is held out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from corolla import AutoDistributedModelForSequenceClassification
from corolla.models.catalog import resolve

Line = tuple[int, str]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="an alias, a directory or a hub id")
    parser.add_argument("--peers", nargs="*", default=[], help="addresses of a swarm; without any the blocks are in this process")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "sentiment.tsv")
    parser.add_argument("--soft-tokens", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="where prompt and head go, in PEFT's format; nowhere by default")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    lines = [(int(label), text) for label, text in (line.split("\t", 1) for line in options.data.read_text().splitlines())]
    held_out = lines[::5]
    training = [line for number, line in enumerate(lines) if number % 5]

    tokenizer = AutoTokenizer.from_pretrained(resolve(options.model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        options.model,
        initial_peers=options.peers,
        torch_dtype="float32",
        tuning_mode="ptune",
        pre_seq_len=options.soft_tokens,
        num_labels=1 + max(label for label, _ in lines),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    print(f"right before training: {accuracy(model, tokenizer, held_out):.0%} of {len(held_out)} held-out sentences")

    trained = [p for p in model.parameters() if p.requires_grad]  # the soft tokens, and the head
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    for _ in track(range(options.epochs), "training", console=Console(stderr=True)):
        shuffled = [training[index] for index in torch.randperm(len(training))]
        for start in range(0, len(shuffled), options.batch):
            batch = shuffled[start : start + options.batch]
            loss = model(**encoded(tokenizer, batch), labels=torch.tensor([label for label, _ in batch])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"right after training: {accuracy(model, tokenizer, held_out):.0%}")
    if options.output is not None:
        model.save_pretrained(options.output)
    model.close()


def encoded(tokenizer: Any, batch: Sequence[Line]) -> dict[str, torch.Tensor]:
    tokens = tokenizer([text for _, text in batch], padding=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, lines: Sequence[Line]) -> float:
    """The share of sentences whose label the model finds."""
    found = model(**encoded(tokenizer, lines)).logits.argmax(1)
    return (found == torch.tensor([label for label, _ in lines])).float().mean().item()


if __name__ == "__main__":
    main()
