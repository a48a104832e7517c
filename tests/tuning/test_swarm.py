"""Two prompts tuned at the same time through the same servers, some of which are killed meanwhile: real processes over real hivemind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback

from corolla.tuning.dialogues import DataSettings
from corolla.tuning.prompt_tuning import TuneSettings, tune
from corolla.tuning.run_record import RunRecord, read_record
from corolla.types import Span
from tests import forked
from tests.swarm.harness import DEADLINE, OVER_HIVEMIND, Swarm
from tests.tuning.conftest import Tune

pytestmark = OVER_HIVEMIND


class Killing(TrainerCallback):
    """Kills the server of the last block before the forward of step 2, and the next one between forward and backward of step 4."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.killed: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def kill(*_: object) -> None:
            peer = model.model.bare.blocks.calls.servers.hops(Span(3, 4))[0].peer
            self.swarm.of(peer).kill()
            self.killed.append(peer)

        if state.global_step == 1:
            kill()
        if state.global_step == 3:
            handle = model.register_forward_hook(lambda *arguments: (kill(), handle.remove())[-1])


def losses(record: RunRecord) -> list[float]:
    return [entry["loss"] for entry in record.curve]


def test_two_at_once_are_as_if_undisturbed(tuning: Tune, models: dict[str, Path], dialogues: Path, tmp_path: Path, quiet: Console) -> None:
    alone = [tuning(f"alone-{seed}", mode="deep_ptune", data={"seed": seed}) for seed in (0, 1)]
    with Swarm(models["llama"], tmp_path, "--dtype", "float32") as swarm:
        swarm.serve("0:2", "2:4", "2:4", "2:4")
        swarm.wait_ready()
        options = ["--data", str(dialogues), "--max-length", "160", "--held-out", "0.1", "--held-out-samples", "3", "--deep", "--seed", "1"]
        options += ["--prompt-tokens", "4", "--batch", "3", "--steps", "6", "--report-to", "none", "--dtype", "float32"]
        command = ["tune", str(models["llama"]), *options, "--output", str(tmp_path / "other"), "--peers", swarm.address]
        with (tmp_path / "log-of-other").open("wb") as log:
            other = forked.start(*command, output=log)
        killing = Killing(swarm)
        try:
            mine = asyncio.run(_tune(models["llama"], tmp_path / "mine", dialogues, quiet, swarm.address, killing))
            assert other.wait(DEADLINE) == 0, (tmp_path / "log-of-other").read_text()
        finally:
            other.kill()
            other.wait(DEADLINE)
    theirs = read_record(tmp_path / "other")
    assert theirs is not None
    assert len(set(killing.killed)) == 2
    for record, undisturbed in ((mine, alone[0]), (theirs, alone[1])):
        assert losses(record) == pytest.approx(losses(undisturbed), rel=1e-5, abs=1e-5)
        assert record.evaluations[-1]["loss"] == pytest.approx(undisturbed.evaluations[-1]["loss"], rel=1e-5, abs=1e-5)
        assert record.samples == undisturbed.samples


async def _tune(model: Path, out: Path, dialogues: Path, console: Console, address: str, killing: Killing) -> RunRecord:
    # While an event loop runs, or hivemind makes one and leaves it open.
    data = DataSettings(data=str(dialogues), max_length=160, held_out=0.1, held_out_samples=3)
    settings = TuneSettings(mode="deep_ptune", prompt_tokens=4, batch=3, steps=6, report_to="none")
    return tune(str(model), out, data, settings, console, peers=[address], callbacks=[killing])
