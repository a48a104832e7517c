"""How many answers in plain bfloat16 differ after a server's death from what they would have been without it.

    python -m tests.swarm.differing --kills 4

The spare server computes the history again in other shapes, so that rounding may tip a near tie; the batch-invariant mode is the
way not to have that. Eight answers run together, half of them drawn, and neighbours change shapes too: what those alone do is
a row of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from corolla.client.tokenizer import TextTokenizer
from corolla.models.catalog import resolve
from corolla.types import GenerationSettings
from tests.swarm.harness import Client, Server, Swarm

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
COUNT = 96
KILL_AT = 32


class Questions:
    """The questions to a swarm of the model in `directory`."""

    def __init__(self, client: Client, directory: Path) -> None:
        self._client = client
        tokenizer = TextTokenizer(directory)
        self._prompts = [tokenizer.encode(question) for question in QUESTIONS]
        self._alone = [self._answer(number) for number in range(len(QUESTIONS))]

    def differing(self, kill: Callable[[tuple[str, ...]], None] | None = None) -> int:
        """How many of the answers differ when all are asked together, and the first one's route is handed to `kill` meanwhile."""
        with ThreadPoolExecutor(len(QUESTIONS)) as threads:
            together = threads.map(lambda number: self._answer(number, kill if number == 0 else None), range(len(QUESTIONS)))
            return sum(answer != alone for answer, alone in zip(together, self._alone, strict=True))

    def _answer(self, number: int, kill: Callable[[tuple[str, ...]], None] | None = None) -> list[int]:
        settings = GenerationSettings(max_tokens_to_generate=COUNT, do_sample=number % 2 == 1, temperature=0.8, seed=number)
        with self._client.chat() as chat:
            at = {KILL_AT: lambda: kill(chat.route)} if kill is not None else {}
            return chat.answer(self._prompts[number], settings, at).tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of plain bfloat16 answers that a server's death changes.")
    parser.add_argument("--kills", type=int, default=4)
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
            questions = Questions(client, directory)
            together = questions.differing()
            killed = 0
            for number in range(given.kills):
                victims: list[Server] = []

                def kill(route: tuple[str, ...], hop: int = number % len(SPANS), victims: list[Server] = victims) -> None:
                    victims.append(swarm.of(route[hop]))
                    victims[0].kill()

                killed += questions.differing(kill)
                client.wait_until_known(*swarm.replace(*victims))
    count = len(QUESTIONS)
    print(f"answers of {COUNT} tokens that differ from the one alone")
    print(f"{count} together, nobody dies: {together} of {count}")
    print(f"{count} together, a server dies at token {KILL_AT}: {killed} of {count * given.kills}")


if __name__ == "__main__":
    main()
