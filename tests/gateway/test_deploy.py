"""What deploy/ says can be said: every command line in it is one that `corolla` takes, and every path that it copies is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from corolla.cli.main import app

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
