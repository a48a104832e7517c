"""How many answers in plain bfloat16 differ after a server's loss from what they would have been without it.

    python -m tests.swarm.differing

The spare server computes the history again in other shapes, so that rounding may tip a near tie; the batch-invariant mode is the
way not to have that. One answer at a time, for neighbours change shapes too. The client gives a server up as it would one that
died, which costs less than to kill one for each answer and computes the same.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from corolla.client.tokenizer import TextTokenizer
from corolla.models.catalog import resolve
from corolla.types import GenerationSettings
from tests.swarm.harness import Client, Swarm

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about rain.",
    "Why is the sky blue?",
    "Explain how bread is made.",
    "List three uses of a rope.",
    "Tell me about the moon.",
    "What does a gardener do in spring?",
    "Describe a busy harbour.",
)
SPANS = ("0:15", "15:30")
COUNT = 64
LOST_AT = (8, 24, 48)


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of plain bfloat16 answers that a server's loss changes.")
    parser.add_argument("--batch-invariant", action="store_true", help="the other mode, where none may differ")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    directory = Path(resolve("smollm2"))
    options = ["--dtype", "bfloat16", *(["--batch-invariant"] if given.batch_invariant else [])]
    with tempfile.TemporaryDirectory() as folder, Swarm(directory, Path(folder), *options) as swarm:
        swarm.serve(*SPANS, *SPANS)
        swarm.wait_ready()
        with Client(swarm) as client:
            client.wait_until_known(*swarm.living)
            tokenizer = TextTokenizer(directory)
            for name, drawn in (("greedy", False), ("drawn at temperature 0.8", True)):
                again, lost, asked = 0, 0, 0
                for number, question in enumerate(QUESTIONS):
                    prompt = tokenizer.encode(question)
                    settings = GenerationSettings(max_tokens_to_generate=COUNT, do_sample=drawn, temperature=0.8, seed=number)
                    undisturbed = answer(client, prompt, settings)
                    again += answer(client, prompt, settings) != undisturbed
                    lost += sum(answer(client, prompt, settings, place) != undisturbed for place in LOST_AT)
                    asked += len(LOST_AT)
                print(
                    f"{name}: {again} of {len(QUESTIONS)} answers differ when asked again, {lost} of {asked} when a server is lost",
                    flush=True,
                )


def answer(client: Client, prompt: list[int], settings: GenerationSettings, lost_at: int = 0) -> list[int]:
    """An answer during which, after so many tokens, a server is given up: the first and the last in turn."""
    with client.chat() as chat:
        at = {lost_at: lambda: chat.give_up(lost_at // 8 % 2)} if lost_at else {}
        return chat.answer(prompt, settings, at).tokens


if __name__ == "__main__":
    main()
