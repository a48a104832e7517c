"""In bfloat16 too, an answer does not depend on a server's death where servers compute in fixed shapes. Real processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from corolla.types import GenerationSettings
from tests.models import tiny
from tests.swarm.harness import OVER_HIVEMIND, Chat, Client, Swarm

pytestmark = OVER_HIVEMIND

PROMPT = [5 + i * 11 % 180 for i in range(90)]
SETTINGS = [
    GenerationSettings(max_tokens_to_generate=120),
    GenerationSettings(max_tokens_to_generate=120, do_sample=True, temperature=0.9, top_p=0.95, seed=7),
]


def test_batch_invariant_answers_in_bfloat16_survive_a_kill_token_for_token(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path / "model", max_position_embeddings=1024)
    with Swarm(directory, tmp_path, "--dtype", "bfloat16", "--batch-invariant") as swarm:
        servers = swarm.serve("0:2", "2:4", "0:2", "2:4")
        swarm.wait_ready()
        with Client(swarm) as client:
            client.wait_until_known(*servers)

            def killer(chat: Chat, hop: int) -> Callable[[], None]:
                return lambda: swarm.of(chat.route[hop]).kill()

            undisturbed = []
            for settings in SETTINGS:
                with client.chat() as chat:
                    undisturbed.append(chat.answer(PROMPT, settings).tokens)
            with client.chat() as greedy, client.chat() as drawn, ThreadPoolExecutor(1) as beside:
                later = beside.submit(drawn.answer, PROMPT, SETTINGS[1])
                answers = [greedy.answer(PROMPT, SETTINGS[0], {30: killer(greedy, 0), 80: killer(greedy, 1)}), later.result()]
    print(f"longest pauses: greedy {answers[0].longest:.2f} s, drawn {answers[1].longest:.2f} s")
    assert [answer.tokens for answer in answers] == undisturbed
