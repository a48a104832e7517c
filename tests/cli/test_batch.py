"""`corolla batch` over a scripted model, and as a real process that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy

from tests.models import tiny

Run = Callable[..., Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('"hello there"\n{broken\n{"id": "b", "messages": [{"role": "user", "content": "hello"}]}\n')
    return path


def results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_file_of_requests(corolla: Run, source: Path, tmp_path: Path) -> None:
    done = corolla("batch", str(source), "--model", "any", "--output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out" / "results.jsonl")
    assert "3 requests, 1 of them errors" in done.stderr
    first, broken, last = results(tmp_path / "out")
    assert (first["id"], first["text"], first["finish_reason"]) == ("in.jsonl:1", "fine, thank you!", "stop")
    assert broken["error"]["message"].startswith(f"{source}, line 2: it is no JSON")
    assert (last["id"], last["text"]) == ("b", "fine, thank you!")
    again = corolla("batch", str(source), "--model", "any", "--output", str(tmp_path / "out"))
    assert "all 3 results are there already" in again.stderr


def test_examples_and_a_template_before_every_request(corolla: Run, model: Any, source: Path, tmp_path: Path) -> None:
    examples = tmp_path / "examples.json"
    examples.write_text('[{"prompt": "and you?", "completion": "fine"}]')
    given = ["--few-shot", str(examples), "--template", "bloomchat", "--system", "Be brief."]
    assert corolla("batch", str(source), "--model", "any", "--output", str(tmp_path / "out"), *given).exit_code == 0
    prompts = {model.tokenizer.decode(step.payload) for step in model.engine.steps}
    begins = "Be brief.\n<human>: and you?\n<bot>: fine\n<human>: "
    assert prompts == {f"{begins}hello there\n<bot>:", f"{begins}hello\n<bot>:"}


def test_settings_of_a_request_go_before_those_of_the_job(corolla: Run, model: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a", "temperature": 0.5}\n{"prompt": "a", "max_tokens": 2, "seed": 5}\n')
    options = ["--max-new-tokens", "9", "--seed", "100", "--top-p", "0.5", "--logprobs"]
    assert corolla("batch", str(source), "--model", "any", "--output", str(tmp_path / "out"), *options).exit_code == 0
    settings = {step.settings.max_tokens_to_generate: step.settings for step in model.engine.steps}
    assert (settings[9].temperature, settings[9].do_sample, settings[9].seed) == (0.5, True, 100)
    assert (settings[2].do_sample, settings[2].seed, settings[2].top_p) == (False, 5, 0.5)
    assert len(results(tmp_path / "out")[1]["logprobs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--strict"], "line 2: it is no JSON"),
        (["--top-p", "7"], "top_p"),
        (["--template", "none"], "there is no 'none'"),
        (["--few-shot", "missing.json"], "missing.json cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_opened(
    corolla: Run, model: Any, source: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = corolla("batch", str(source), "--model", "any", "--output", str(tmp_path / "out"), *arguments)
    assert (done.exit_code, model.opened) == (2, [])
    assert says in done.stderr


def test_an_empty_file_and_an_output_within_the_input(corolla: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    assert "holds no request" in corolla("batch", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")).stderr
    assert "lies within the input" in corolla("batch", str(tmp_path), "--output", str(tmp_path / "out")).stderr


def test_a_job_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    directory, output, source = tmp_path / "model", tmp_path / "out", tmp_path / "in.jsonl"
    tiny.save("bloom", directory, vocab_size=400)
    toy.make_directory(tmp_path / "toy", toy.byte_level())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tmp_path / "toy" / name).read_bytes())
    source.write_text("".join(f'"request {number}"\n' for number in range(300)))
    run = "from corolla.cli.main import app; app()"
    command = [sys.executable, "-c", run, "batch", str(source), "--model", str(directory), "--output", str(output)]
    command += ["--dtype", "float32", "--concurrency", "4", "--max-new-tokens", "40"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    journal = output / "journal.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") >= 10):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    kept = {entry["index"]: entry["result"] for entry in map(json.loads, journal.read_text().splitlines()[:-1])}
    assert 10 <= len(kept) + 1 < 300, "it was killed too late or too early to show anything"
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    found = results(output)
    assert [result["id"] for result in found] == [f"in.jsonl:{line}" for line in range(1, 301)]
    assert all(found[index] == result for index, result in kept.items())
    answered = int(done.stderr.rsplit("\n", 2)[-2].split(" requests")[0])
    assert answered <= 300 - len(kept), "what was there already was computed again"
