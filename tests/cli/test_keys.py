from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from corolla.cli.main import app


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["keys", *arguments, "--database", str(tmp_path / "gateway.sqlite")])
        return result.exit_code, result.stdout.strip()

    code, key = run("create", "alice", "--rate", "60")
    assert code == 0
    assert key.startswith("ck-")
    assert run("create", "alice")[0] == 2
    code, listed = run("list", "--json")
    [entry] = json.loads(listed)
    assert (entry["name"], entry["rate"], entry["revoked"]) == ("alice", 60.0, None)
    assert key not in listed
    assert run("revoke", "alice") == (0, "")
    assert run("revoke", "alice")[0] == 2
    assert "alice" in run("list")[1]


def test_a_gateway_asks_for_a_swarm() -> None:
    result = CliRunner().invoke(app, ["gateway"])
    assert result.exit_code == 2
    assert "--peers" in result.stderr
