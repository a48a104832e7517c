"""`corolla finetune`'s trainer beside a bare PyTorch loop of the same model, optimizer and data: trained tokens a second.

    python benchmarks/finetuning.py [--hidden 256] [--layers 4] [--steps 20] [--dtype bfloat16] [--threads 2] [--json FILE]

A step is forward, backward, clipping and AdamW over --batch packed sequences of --length tokens of a BLOOM with random weights, several
articles in each. The bare loop does nothing else: no masks for packed articles, no checks for numbers that are none, no log. It runs over
the stock module, and over the module as the trainer makes it quicker (`corolla.tuning.bloom.quicken`).
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from common import Table, rounds
from corolla.data.tokens import Kind, Tokens
from corolla.tuning.batches import Collator, SequenceDataset, wants_mask
from corolla.tuning.bloom import quicken
from corolla.tuning.finetune_trainer import FinetuneTrainer
from corolla.tuning.recipe import Recipe

WARMUP = 2  # steps that do not count


def make_model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": options.hidden, "n_layer": options.layers, "n_head": max(1, options.hidden // 32)}
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=options.vocabulary, **shape))


def make_rows(options: argparse.Namespace) -> list[Tokens]:
    generator = np.random.default_rng(0)
    kinds = np.full(options.length, Kind.COMPLETION, np.int32)
    kinds[options.length // options.articles - 1 :: options.length // options.articles] = Kind.END
    count = options.batch * (options.steps + WARMUP)
    return [Tokens(generator.integers(5, options.vocabulary, options.length, dtype=np.int32), kinds) for _ in range(count)]


class Clock(TrainerCallback):
    """When the steps that count began and ended."""

    def __init__(self) -> None:
        self.begun = self.ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()
        if state.global_step == WARMUP:
            self.begun = self.ended


def corolla(options: argparse.Namespace, rows: list[Tokens], _round: int) -> Mapping[str, float]:
    model, clock = make_model(options), Clock()
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps + WARMUP,
            bf16=options.dtype == "bfloat16",
            use_cpu=options.device == "cpu",
            max_grad_norm=1.0,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        mask_dtype = getattr(torch, options.dtype)
        collator = Collator(2, wants_mask=wants_mask(model), mask_dtype=mask_dtype)
        recipe = Recipe(name="benchmark", dtype=options.dtype, batch=options.batch)
        trainer = FinetuneTrainer(model, recipe, arguments, SequenceDataset(rows), None, collator, [clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"corolla": options.steps * options.batch * options.length / (clock.ended - clock.begun)}


def bare(options: argparse.Namespace, rows: list[Tokens], quickened: bool, _round: int) -> Mapping[str, float]:
    model = make_model(options).to(options.device).train()
    if quickened:
        quicken(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = [
        torch.from_numpy(np.stack([row.input_ids for row in rows[start : start + options.batch]])).long().to(options.device)
        for start in range(0, len(rows), options.batch)
    ]
    begun = 0.0
    for step, ids in enumerate(batches):
        if step == WARMUP:
            begun = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"quickened" if quickened else "bare": options.steps * options.batch * options.length / (time.perf_counter() - begun)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--articles", type=int, default=4, help="in each sequence")
    parser.add_argument("--steps", type=int, default=20, help="that count")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for both sides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    rows = make_rows(options)
    cells = {
        "bare": functools.partial(bare, options, rows, False),
        "quickened": functools.partial(bare, options, rows, True),
        "corolla": functools.partial(corolla, options, rows),
    }
    figures = rounds(options.repeats, cells)
    table = Table("finetuning", {key: value for key, value in vars(options).items() if key != "json"})
    table.add("a bare PyTorch loop", "tokens/s", figures["bare"])
    table.add("a bare loop over the quicker module", "tokens/s", figures["quickened"])
    table.add("corolla finetune's trainer", "tokens/s", figures["corolla"])
    table.ratio("corolla / bare", "x", figures["corolla"], figures["bare"], reach=0.95)
    table.ratio("corolla / bare over the quicker module", "x", figures["corolla"], figures["quickened"], reach=0.95)
    table.report(options.json)


if __name__ == "__main__":
    main()
