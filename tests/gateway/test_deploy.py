"""What deploy/ says can be said: every command line in it is one that `corolla` takes, and every path that it copies is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
import typer
import yaml

from corolla.cli.main import app
from tests.swarm.harness import DEADLINE, free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def command_lines() -> list[str]:
    """Of the compose file and the units, with placeholders for what is found out when they run."""
    scripts = [
        " ".join(service["entrypoint"][2:]) for service in COMPOSE["services"].values() if service.get("entrypoint", [""])[0] == "sh"
    ]
    lines = [part for script in scripts for part in re.split(r"[;|]+", re.sub(r'"\$\$\(.*?\)"', "FOUND", script))]
    for unit in DEPLOY.glob("*.service"):
        lines += re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
        lines += re.findall(r"(/opt/corolla/bin/corolla keys .*)$", unit.read_text(), re.MULTILINE)
    return [line[line.index("corolla ") :] for line in lines if "corolla " in line]


def test_there_are_some() -> None:
    assert {line.split()[1] for line in command_lines()} >= {"bootstrap", "serve", "gateway", "keys"}


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_is_understood(line: str) -> None:
    command, words = typer.main.get_command(app), shlex.split(re.sub(r"\$\{\w+\}", "FOUND", line))[1:]
    context = command.make_context("corolla", words.copy(), resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        context = typer.Context(command, info_name=name, parent=context)
    command.make_parser(context).parse_args(words)  # raises for an option that there is not


def test_the_services_hold_all_blocks_of_the_model() -> None:
    spans = sorted(tuple(map(int, match)) for line in command_lines() for match in re.findall(r"smollm2 .*--blocks (\d+):(\d+)", line))
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == 30
    assert len(spans) == 3


def test_the_image_is_built_from_what_there_is() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert "constraints.txt" in dockerfile
    assert 'ENTRYPOINT ["corolla"]' in dockerfile
    assert COMPOSE["x-corolla"]["build"] == {"context": "..", "dockerfile": "deploy/Dockerfile"}
    for service in COMPOSE["services"].values():
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
        assert all(volume.split(":")[0] in COMPOSE["volumes"] for volume in service.get("volumes", []))


@contextmanager
def services(folder: Path, ports: dict[str, int], names: list[str]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """What these services run, without containers: places and ports are this machine's. They are told to leave at the end."""
    own = {"COROLLA_SECRET": "a secret of the tests", "XDG_DATA_HOME": str(folder / "data"), "TMPDIR": str(folder)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    running = {}
    with ExitStack() as stack:
        for name in names:
            script: str = COMPOSE["services"][name]["entrypoint"][2].replace("$$", "$").replace("/swarm/", f"{folder}/")
            for port in ports:
                script = script.replace(f"--port {port}", f"--port {ports[port]}")
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                ["sh", "-c", script], stdout=log, stderr=log, start_new_session=True, env={**os.environ, **own, "PATH": path}
            )
            running[name] = stack.enter_context(process)
            stack.callback(process.kill)
        yield running
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait(DEADLINE)


def wait_for(true: Callable[[], object], running: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        for name, process in running.items():
            assert process.poll() is None, (folder / f"{name}.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_services_make_a_swarm_that_answers(tmp_path: Path) -> None:
    ports, address = {"4001": free_port(), "8000": free_port()}, tmp_path / "address"
    with services(tmp_path, ports, ["bootstrap"]) as bootstrap:
        wait_for(lambda: address.exists() and address.stat().st_size, bootstrap, tmp_path)
        with (
            services(tmp_path, ports, ["first", "second", "third", "gateway"]) as others,
            httpx2.Client(base_url=f"http://127.0.0.1:{ports['8000']}", timeout=DEADLINE) as client,
        ):
            wait_for(lambda: is_ready(client), others, tmp_path)
            question = {"role": "user", "content": "Which is the largest ocean of the Earth?"}
            asked = {"messages": [question], "temperature": 0, "max_tokens": 20}
            assert client.post("/v1/chat/completions", json=asked).status_code == 401
            (key,) = re.findall(r"ck-\S+", (tmp_path / "gateway.log").read_text())
            answer = client.post("/v1/chat/completions", json=asked, headers={"Authorization": f"Bearer {key}"})
            assert "Pacific" in answer.json()["choices"][0]["message"]["content"]
        assert [process.returncode for process in others.values()] == [0] * 4


def is_ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx2.ConnectError:
        return False
