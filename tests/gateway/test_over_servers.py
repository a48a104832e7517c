"""`corolla gateway` over real servers: a chat, and an end that lets it finish."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx2

from tests.gateway.running import make_model
from tests.swarm.harness import DEADLINE, Server, Swarm


def start_gateway(swarm: Swarm, folder: Path, *options: str) -> Server:
    database = str(folder / "gateway.sqlite")
    return swarm.run("gateway", str(swarm.directory), "--peers", swarm.address, "--port", "0", "--database", database, *options)


def test_a_gateway_answers_loses_a_server_and_finishes_what_it_began(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    directory = make_model(tmp_path / "model")
    with Swarm(directory, tmp_path, "--dtype", "float32") as swarm:
        swarm.serve("0:2", "2:4")
        swarm.wait_ready()
        gateway = start_gateway(swarm, tmp_path)
        try:
            url = gateway.wait_ready().ready_file.read_text().strip()
            body = {"prompt": "What is the capital of France?", "temperature": 0, "max_tokens": 300}
            with httpx2.Client(base_url=url, timeout=DEADLINE) as client:
                assert client.get("/readyz").json()["ready"]
                whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
                [served] = client.get("/api/ui/swarm").json()["models"]
                assert [(server["start"], server["end"]) for server in served["servers"]] == [(0, 2), (2, 4)]

                dying = swarm.servers[1]
                answers: list[str] = []
                asking = threading.Thread(
                    target=lambda: answers.append(client.post("/v1/completions", json=body).json()["choices"][0]["text"]), daemon=True
                )
                asking.start()
                time.sleep(0.1)
                dying.kill()
                swarm.replace(dying)
                asking.join(DEADLINE)
                assert answers == [whole]

                with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                    lines = stream.iter_lines()
                    next(lines)
                    gateway.signal(signal.SIGTERM, alone=True)
                    assert "data: [DONE]" in list(lines)
            assert gateway.process.wait(DEADLINE) == 0, gateway.said
        finally:
            gateway.end()
