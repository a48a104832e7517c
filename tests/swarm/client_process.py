"""A client in a process of its own: answers a prompt through a swarm, and says when some tokens are there.

    python client_process.py DIRECTORY ADDRESS COUNT SAY_AT

Prints "there" after SAY_AT tokens and, at the end, the token ids on one line.
"""

from __future__ import annotations

import sys
from pathlib import Path

from corolla.client.discovery import join_swarm
from corolla.client.session import Session
from corolla.swarm.peer import PeerConfig
from corolla.types import GenerationSettings

PROMPT = [5 + i * 11 % 180 for i in range(90)]


def main() -> None:
    directory, address, count, say_at = sys.argv[1:]
    settings = GenerationSettings(max_tokens_to_generate=int(count))
    with (
        join_swarm(Path(directory), PeerConfig(initial_peers=[address], client_mode=True)) as joined,
        Session(joined.transport, "") as session,
    ):
        tokens = []
        for token in session.generate(PROMPT, settings, timeout=180.0):
            tokens.append(token.token_id)
            if len(tokens) == int(say_at):
                print("there", flush=True)
                sys.stdin.readline()  # until the test has done what it wants
    print(*tokens, flush=True)


if __name__ == "__main__":
    main()
