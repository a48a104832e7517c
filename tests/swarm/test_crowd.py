"""More sessions than a swarm has room for: all are answered, each with its own tokens. Real processes over real hivemind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from corolla.models.reference import Reference
from corolla.types import GenerationSettings
from tests.models import tiny
from tests.swarm.harness import OVER_HIVEMIND, Answer, Client, Swarm

pytestmark = OVER_HIVEMIND

SESSIONS = 64
ROOM = 16
LENGTH = 128  # tokens that a session has in the end: two turns of 40 and 24, four pages
SETTINGS = GenerationSettings(max_tokens_to_generate=24)


def prompts(number: int) -> list[list[int]]:
    """Both turns of a session, unlike any other's."""
    return [[3 + (number * 31 + turn * 7 + i * i) % 190 for i in range(40)] for turn in range(2)]


def test_64_sessions_share_the_room_of_16_and_come_back_after_eviction(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path / "model")
    reference = Reference(directory)

    def expected(number: int) -> list[list[int]]:
        history: list[int] = []
        for prompt in prompts(number):
            history += prompt
            history += reference.greedy(history, SETTINGS.max_tokens_to_generate)
        return [history[40:64], history[104:128]]

    with Swarm(directory, tmp_path, "--dtype", "float32", "--cache-tokens", str(ROOM * LENGTH)) as swarm:
        servers = swarm.serve("0:2", "2:4")
        swarm.wait_ready()
        with Client(swarm) as client, ThreadPoolExecutor(SESSIONS) as threads:
            client.wait_until_known(*servers)
            chats = [client.chat(patience=240.0) for _ in range(SESSIONS)]

            def turn(which: int) -> list[Answer]:
                """All sessions at once, so that each has lost its place by the time of its next turn."""
                return list(threads.map(lambda number: chats[number].answer(prompts(number)[which], SETTINGS), range(SESSIONS)))

            answers = list(zip(turn(0), turn(1), strict=True))
            for chat in chats:
                chat.close()
            replays, faults = client.transport.counters.replays, client.transport.counters.faults
        print(f"{replays} replays; longest wait {max(answer.longest for pair in answers for answer in pair):.1f} s")
    for number, pair in enumerate(answers):
        assert [answer.tokens for answer in pair] == expected(number), f"session {number}"
    assert replays > 0  # somebody was evicted
    assert faults == 0  # and nobody is to blame
