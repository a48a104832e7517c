"""`corolla tune` as people run it: interrupted and resumed, reporting to trackio, and with mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toy

from corolla.tuning.run_record import read_record
from tests.models import tiny

DEADLINE = 180.0  # seconds for a process on a loaded machine

# Beside the command line: no connection leaves this machine, whatever libraries would like to send; and where there is a file "hold",
# the first record with a step waits until the file is gone, so that a signal finds the run in its middle.
WATCHED = """
import os, sys, time
def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1", "localhost"):
        print(f"CONNECTS TO {arguments[1]}", file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "::1", "localhost", None):
        print(f"CONNECTS TO {arguments[0]}", file=sys.stderr, flush=True)
    if event == "os.rename" and str(arguments[1]).endswith("tuning.json") and os.path.exists("hold"):
        with open(arguments[0]) as file:
            if '"curve": []' in file.read():
                return
        os.rename("hold", "held")
        while os.path.exists("held"):
            time.sleep(0.05)
sys.addaudithook(watch)
from corolla.cli.main import app
app()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = toy.make_directory(tmp_path_factory.mktemp("model"), toy.byte_level(), model_type="llama")
    return tiny.save("llama", directory, vocab_size=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "fine"}]} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs `corolla tune` in `tmp_path`; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WATCHED, "tune", *arguments]
        environment = {"PATH": "", "HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield run
    for process in started:
        with process:  # which closes its pipes
            process.kill()


def test_it_is_interrupted_and_resumed_and_tells_nobody(
    start: Callable[..., subprocess.Popen[str]], model: Path, data: Path, tmp_path: Path
) -> None:
    arguments = [str(model), "--data", str(data), "--output", "prompt", "--held-out", "0.2", "--batch", "2", "--dtype", "float32"]
    arguments += ["--steps", "12"]
    (tmp_path / "hold").touch()
    process = start(*arguments, "--save-every", "2")
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "held").exists():
        assert process.poll() is None, process.communicate(timeout=DEADLINE)
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    (tmp_path / "held").unlink()
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, stderr
    halted = read_record(tmp_path / "prompt")
    assert halted is not None
    assert halted.status == "interrupted"
    assert halted.steps["done"] < 12
    assert f"step {halted.steps['done']} is saved" in stderr
    assert "corolla tune" in stderr
    assert "--resume" in stderr
    assert (tmp_path / "prompt" / "adapter_model.safetensors").exists()
    resumed = start(*arguments, "--resume")
    stdout, stderr = resumed.communicate(timeout=DEADLINE)
    assert resumed.returncode == 0, stderr
    assert "corolla chat" in stdout
    assert "--prompt prompt" in stdout
    done = read_record(tmp_path / "prompt")
    assert done is not None
    assert [entry["step"] for entry in done.curve] == list(range(1, 13))
    assert list((tmp_path / "trackio").glob("*.db"))
    assert "CONNECTS TO" not in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.jsonl"], "does not exist"),
        (["--data", "DATA", "--learning-rate", "0"], "learning-rate"),
        (["--data", "DATA", "--report-to", "wandb"], "wandb is not installed"),
        (["--data", "DATA", "--resume"], "no run to go on with"),
    ],
)
def test_a_mistake_is_one_sentence(model: Path, data: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    from typer.testing import CliRunner

    from corolla.cli.main import app

    given = [str(data) if argument == "DATA" else argument for argument in arguments]
    report = [] if "--report-to" in given else ["--report-to", "none"]
    result = CliRunner().invoke(app, ["tune", str(model), "--output", str(tmp_path / "prompt"), *given, *report])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
