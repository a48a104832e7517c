"""Replies to held-out conversations, without a prompt and with it: what a reader sees of a tuned prompt first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from corolla.chat.templates import Template, Turn, encode, stop_ids
from corolla.data.examples import Example
from corolla.data.render import instructions
from corolla.data.tokens import TrainingTokenizer
from corolla.remote.modeling import DistributedForCausalLM

_TURNS = 3  # of a conversation, before the reply
_TOKENS = 48


def conversations(examples: Sequence[Example], template: Template, count: int) -> list[dict[str, Any]]:
    """The beginnings of `count` dialogues, each up to where a reply is to come; entries of the record's `samples`."""
    samples = []
    for example in examples:
        replies = [index for index, turn in enumerate(example.turns) if turn.role == "assistant" and 0 < index <= _TURNS]
        if example.raw or not replies:
            continue
        turns, reference = example.turns[: replies[-1]], example.turns[replies[-1]].content
        samples.append(
            {
                "system": instructions(example, template),
                "conversation": [{"role": turn.role, "content": turn.content} for turn in turns],
                "reference": reference,
                "before": None,
                "after": None,
            }
        )
        if len(samples) == count:
            break
    return samples


def reply(model: DistributedForCausalLM, tokenizer: TrainingTokenizer, template: Template, sample: dict[str, Any]) -> str:
    """The likeliest reply in a sample's conversation, of some dozens of tokens at the most."""
    turns = [Turn(turn["role"], turn["content"]) for turn in sample["conversation"]]
    ids = encode(template, tokenizer, sample["system"], turns)
    ends = list(stop_ids(template, tokenizer))
    with torch.inference_mode():
        answer = model.generate(
            torch.tensor([ids], device=model.device),
            max_new_tokens=_TOKENS,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=tokenizer.end_id,
        )
    text = tokenizer.decode(answer[0, len(ids) :].tolist())
    for stop in template.stop_sequences:
        text = text.partition(stop)[0]
    return text.strip()


@contextmanager
def without_prompt(model: DistributedForCausalLM) -> Iterator[None]:
    """The model as it is on its own, until the block ends."""
    prompts = model.bare.prompts
    model.bare.prompts = None
    try:
        yield
    finally:
        model.bare.prompts = prompts
