"""Research on hidden states: read activations between blocks, and train a module of one's own between two spans.

The blocks are elsewhere; what goes in and comes out between any two of them is here, with gradients. This script prints how large
hidden states grow from block to block, then puts a small adapter (Houlsby et al., 2019) in the middle of the model and trains it
on the happy half of some sentences about films.

    python examples/between_blocks.py
    python examples/between_blocks.py --model bigscience/bloom-560m --peers /ip4/.../p2p/...
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoTokenizer

from corolla import AutoDistributedModelForCausalLM
from corolla.models.catalog import resolve


class Adapter(nn.Module):
    """Down to a few values and up again, added to what came; it changes nothing at first."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.up(nn.functional.gelu(self.down(hidden)))
        return hidden + changed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="an alias, a directory or a hub id")
    parser.add_argument("--peers", nargs="*", default=[], help="addresses of a swarm; without any the blocks are in this process")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "sentiment.tsv", help="lines of label<TAB>sentence")
    parser.add_argument("--inner", type=int, default=16, help="values inside the adapter")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.manual_seed(42)

    tokenizer = AutoTokenizer.from_pretrained(resolve(options.model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoDistributedModelForCausalLM.from_pretrained(options.model, initial_peers=options.peers, torch_dtype="float32")
    happy = [text for label, text in (line.split("\t", 1) for line in options.data.read_text().splitlines()) if label == "1"]
    held_out, training = happy[: options.batch], happy[options.batch :]

    # Activations between all blocks, as transformers gives them.
    encoded = tokenizer(held_out, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(encoded["input_ids"], attention_mask=encoded["attention_mask"], output_hidden_states=True).hidden_states
    for number, state in enumerate(states[:-1]):
        print(f"into block {number:2}: mean norm {state[encoded['attention_mask'].bool()].norm(dim=1).mean():8.2f}")

    # A module between two spans: only its own weights are trained.
    adapter = Adapter(states[0].shape[2], options.inner)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    with torch.no_grad():
        print(f"loss on held-out sentences before: {loss_of(model, adapter, tokenizer, held_out):.3f}")
    for _ in track(range(options.steps), "training", console=Console(stderr=True)):
        batch = [training[index] for index in torch.randperm(len(training))[: options.batch]]
        optimizer.zero_grad()
        loss_of(model, adapter, tokenizer, batch).backward()
        optimizer.step()
    with torch.no_grad():
        print(f"loss on held-out sentences after: {loss_of(model, adapter, tokenizer, held_out):.3f}")
    model.close()


def loss_of(model: Any, adapter: Adapter, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """The loss of texts under the model with the adapter in its middle."""
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    base = model.base_model
    blocks = base.blocks  # `model.model.layers` of Llama, `model.transformer.h` of BLOOM
    middle = len(blocks) // 2
    hidden = base.entering(model.get_input_embeddings()(ids))
    hidden = blocks[:middle](hidden, attention_mask=mask)
    hidden = adapter(hidden)
    hidden = blocks[middle:](hidden, attention_mask=mask)
    logits = model.get_output_embeddings()(base.leaving(hidden))
    labels = ids.masked_fill(mask == 0, -100)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


if __name__ == "__main__":
    main()
