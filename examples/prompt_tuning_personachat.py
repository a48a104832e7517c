"""A chatbot by prompt tuning: the steps of Petals' PersonaChat notebook, with Corolla's names.

A few embeddings in front of every text are trained, through blocks that other machines compute, to speak as a person with a
character; then one talks with the result, the servers keeping the conversation's caches.

    python examples/prompt_tuning_personachat.py
    python examples/prompt_tuning_personachat.py --model bigscience/bloom-560m --peers /ip4/.../p2p/... --data personachat.txt

`--data` takes PersonaChat in any form that `corolla prepare` reads; a few dialogues lie beside this script. `corolla tune` is the
same as a command, with held-out perplexity, checkpoints and a chat template.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, get_scheduler

from corolla import AutoDistributedModelForCausalLM
from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.models.catalog import resolve

TURN_END = "\n-----\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="an alias, a directory or a hub id")
    parser.add_argument("--peers", nargs="*", default=[], help="addresses of a swarm; without any the blocks are in this process")
    parser.add_argument("--data", default=Path(__file__).parent / "dialogues.txt", help="dialogues: a file or a dataset of the hub")
    parser.add_argument("--tuning-mode", default="ptune", choices=["ptune", "deep_ptune"])
    parser.add_argument("--soft-tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text; a longer one is cut")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="where the prompt goes, in PEFT's format; nowhere by default")
    parser.add_argument("--say", nargs="*", help="what to say to the chatbot; asked for by default")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    # 1. A model with soft tokens in front. Its embeddings and its head are here, its blocks are elsewhere.
    tokenizer = AutoTokenizer.from_pretrained(resolve(options.model))
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoDistributedModelForCausalLM.from_pretrained(
        options.model,
        initial_peers=options.peers,
        torch_dtype="float32",
        tuning_mode=options.tuning_mode,
        pre_seq_len=options.soft_tokens,
    )

    # 2. Dialogues as texts. Padding is neither computed nor in the loss.
    def collate(batch: list[str]) -> dict[str, torch.Tensor]:
        encoded = tokenizer(batch, padding=True, truncation=True, max_length=options.max_length, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    loader: DataLoader[str] = DataLoader(list(texts(options.data)), batch_size=options.batch, shuffle=True, collate_fn=collate)

    # 3. Training: only the soft tokens change.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=options.steps)
    losses = []
    for batch in track(forever(loader, options.steps), "training", total=options.steps, console=Console(stderr=True)):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss of the first batch: {losses[0]:.3f}, of the last one: {losses[-1]:.3f}")
    if options.output is not None:
        model.save_pretrained(options.output)

    # 4. A conversation in one session: a turn sends its new tokens only.
    with model.inference_session(max_length=512) as session:
        for said in options.say if options.say is not None else spoken():
            inputs: torch.Tensor | None = tokenizer(f"{said}{TURN_END}", return_tensors="pt")["input_ids"]
            print("Friend: ", end="", flush=True)
            begun = False
            for _ in range(60):
                answer = model.generate(inputs, max_new_tokens=1, do_sample=True, temperature=0.7, top_k=50, session=session)
                inputs = None
                piece = tokenizer.decode(answer[0, -1:])
                begun = begun or bool(piece.strip("-\n "))  # after few steps it begins with another ruler
                if begun and ("\n" in piece or answer[0, -1] == tokenizer.eos_token_id):
                    break
                if begun:
                    print(piece, end="", flush=True)
            print()
    model.close()


def texts(source: str | Path) -> Iterator[str]:
    """The dialogues of a file, the persona first, each turn ended by a ruler, as the notebook has them."""
    for example in read(source, Problems()):
        yield TURN_END.join([*example.persona, *(turn.content for turn in example.turns), ""])


def forever(loader: DataLoader[str], steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of as many epochs as the steps take."""
    done = 0
    while done < steps:
        for batch in loader:
            yield batch
            done += 1
            if done == steps:
                return


def spoken() -> Iterator[str]:
    """What is typed, until an empty line."""
    while said := input("You: ").strip():
        yield said


if __name__ == "__main__":
    main()
