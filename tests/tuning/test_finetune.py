"""Whole runs: what is saved, how a run goes on, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, pipeline
from tuning.finetuning import dialogues, make_directory, sequence

from corolla.chat.templates import TEMPLATES, Turn, encode
from corolla.client.tokenizer import TextTokenizer
from corolla.data.hdf5 import write_sequences
from corolla.errors import CallerError, CheckpointError, DataError, InvalidSetting, StorageError, TrainingError
from corolla.tuning.finetune import finetune
from corolla.tuning.finetune_run import TRAINING, FinetuneSettings
from corolla.tuning.recipe import Phase, Recipe
from corolla.tuning.run_record import RunRecord

RECIPE: dict[str, Any] = {
    "name": "test",
    "template": "sft-chat",
    "max_length": 64,
    "batch": 2,
    "accumulation": 2,
    "dtype": "float32",
    "learning_rate": 1e-2,
    "schedule": "one-cycle",
    "warmup": 0.3,
    "held_out": 0.2,
    "phases": (Phase(epochs=2),),
}
SETTINGS: dict[str, Any] = {"device": "cpu", "evaluate_every": 1, "licence": "apache-2.0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dialogues(tmp_path_factory.mktemp("data") / "dialogues.jsonl")


def run(
    model: Path,
    data: Path,
    output: Path,
    *,
    resume: bool = False,
    lora: bool = False,
    checkpointing: bool = False,
    callbacks: Any = (),
    **recipe: Any,
) -> RunRecord:
    chosen, settings = Recipe(**{**RECIPE, **recipe}), FinetuneSettings(**SETTINGS, lora=lora, gradient_checkpointing=checkpointing)
    return finetune(str(model), [str(data)], output, chosen, settings, Console(quiet=True), resume=resume, callbacks=callbacks)


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    output = tmp_path_factory.mktemp("runs") / "tuned"
    return output, run(model, data, output)


def test_a_run_learns_and_writes_down_what_it_did(finished: tuple[Path, RunRecord]) -> None:
    output, record = finished
    assert record.base is not None
    assert min(entry["loss"] for entry in record.evaluations) < record.base["loss"] - 0.1
    written = json.loads((output / "finetuning.json").read_text())
    assert (written["status"], written["steps"]["done"]) == ("done", written["steps"]["total"])
    assert len(written["data"]["phases"][0]["sources"][0]["sha256"]) == 64
    assert written["settings"]["recipe"]["learning_rate"] == 1e-2
    assert {"corolla", "torch", "transformers"} <= set(written["versions"])


def test_the_directory_is_an_ordinary_one_without_pickles(finished: tuple[Path, RunRecord]) -> None:
    output, _ = finished
    names = {path.name for path in output.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", "recipe.yaml", "SHA256SUMS"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert TRAINING not in names
    card = (output / "README.md").read_text()
    assert card.startswith("---\n")
    assert all(said in card for said in ("license: apache-2.0", "held-out", "dialogues.jsonl", "label_smoothing"))
    assert str(output.parent) not in card


def test_the_template_lies_in_the_tokenizers_configuration_too(finished: tuple[Path, RunRecord]) -> None:
    template = json.loads((finished[0] / "tokenizer_config.json").read_text())["chat_template"]
    assert "{%- generation -%}" in template
    assert template == (finished[0] / "chat_template.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(trained) == "hi</s>"


def test_gradient_checkpointing_changes_nothing_but_memory(
    finished: tuple[Path, RunRecord], model: Path, data: Path, tmp_path: Path
) -> None:
    run(model, data, tmp_path / "out", checkpointing=True)
    ours, theirs = (load_file(each / "model.safetensors") for each in (tmp_path / "out", finished[0]))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)


def test_the_pipeline_of_transformers_talks_by_the_template(finished: tuple[Path, RunRecord]) -> None:
    output, _ = finished
    chat = pipeline("text-generation", str(output), device="cpu")
    question = [{"role": "user", "content": "hello, this is 3"}]
    answer = chat(question, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert ids == encode(TEMPLATES["sft-chat"], TextTokenizer(output), "", [Turn("user", "hello, this is 3")])


def test_the_best_weights_are_those_saved(finished: tuple[Path, RunRecord], model: Path, data: Path, tmp_path: Path) -> None:
    output, record = finished
    again = run(output, data, tmp_path / "again", template="tokenizer")
    assert again.base is not None
    assert again.base["loss"] == pytest.approx(min(entry["loss"] for entry in record.evaluations), rel=1e-4)


def test_the_same_run_gives_the_same_bytes(finished: tuple[Path, RunRecord], model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


class Signalling(TrainerCallback):
    """Sends this process a signal after a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


_KILLED = """
import signal, sys
from pathlib import Path
from tuning.test_finetune import Signalling, run
run(*map(Path, sys.argv[1:4]), callbacks=[Signalling(signal.SIGKILL, int(sys.argv[4]))])
"""


def test_a_killed_run_goes_on_to_the_same_bytes(finished: tuple[Path, RunRecord], model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'tests'}:{root}"}
    done = subprocess.run([sys.executable, "-c", _KILLED, model, data, output, "4"], env=environment, timeout=600, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list((output / TRAINING / "phase-1").glob("checkpoint-*"))
    run(model, data, output, resume=True)
    assert (output / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()
    records = [json.loads((each / "finetuning.json").read_text()) for each in (output, finished[0])]
    curves = [[point["loss"] for point in record["curve"]] for record in records]
    assert curves[0] == curves[1]


_SHARED = """
import sys
from pathlib import Path
from tuning.test_finetune import run
run(*map(Path, sys.argv[1:4]))
"""


def test_two_processes_share_a_run(finished: tuple[Path, RunRecord], model: Path, data: Path, tmp_path: Path) -> None:
    root, script = Path(__file__).parents[2], tmp_path / "run.py"
    script.write_text(_SHARED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        model,
        data,
        tmp_path / "out",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'tests'}:{root}"}
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    records = [json.loads((each / "finetuning.json").read_text()) for each in (tmp_path / "out", finished[0])]
    assert [record["status"] for record in records] == ["done", "done"]
    losses = [[point["loss"] for point in record["curve"]] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in finished[0].iterdir()}


def test_two_phases_go_on_from_one_another(model: Path, data: Path, tmp_path: Path) -> None:
    record = run(model, data, tmp_path / "two", phases=(Phase(name="text", loss="all"), Phase(name="chat", learning_rate=1e-3)))
    assert [phase["name"] for phase in record.data["phases"]] == ["text", "chat"]
    assert record.data["phases"][0]["training"]["trained_tokens"] > record.data["phases"][1]["training"]["trained_tokens"]
    assert record.data["phases"][0]["held_out"] == record.data["phases"][1]["held_out"]
    assert [point["step"] for point in record.curve] == list(range(1, record.steps["total"] + 1))


# PEFT looks for checkpointing by a name that transformers gives up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_saves_an_adapter_of_peft(model: Path, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    record = run(model, data, tmp_path / "lora", lora=True)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert all(torch.equal(before[name], tensor) for name, tensor in load_file(model / "model.safetensors").items() if name in before)
    assert adapted.peft_config["default"].r == 16
    assert record.base is not None
    assert min(entry["loss"] for entry in record.evaluations) < record.base["loss"]


def test_prepared_sequences(model: Path, tmp_path: Path) -> None:
    write_sequences(tmp_path / "train.hdf5", [sequence(20, 12, padding=8, seed=seed) for seed in range(10)], 40)
    record = run(model, tmp_path / "train.hdf5", tmp_path / "out")
    assert record.data["phases"][0]["training"]["sequences"] == 8
    assert record.data["phases"][0]["held_out"]["sequences"] == 2


def test_interrupting_saves_and_resuming_ends_alike(finished: tuple[Path, RunRecord], model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "out", callbacks=[Signalling(signal.SIGINT, 3)])
    assert json.loads((tmp_path / "out" / "finetuning.json").read_text())["status"] == "interrupted"
    with pytest.raises(TrainingError, match="recipe is another"):
        run(model, data, tmp_path / "out", resume=True, seed=3)
    run(model, data, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("small_disk", ["900k"], indirect=True)  # a checkpoint finds room, and no second one beside it
def test_a_full_disk_loses_nothing(finished: tuple[Path, RunRecord], model: Path, data: Path, small_disk: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        run(model, data, small_disk / "out")
    assert not (small_disk / "out" / "config.json").exists()
    assert [path.name for path in (small_disk / "out" / TRAINING / "phase-1").glob("checkpoint-*")]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    run(model, data, small_disk / "out", resume=True)
    assert (small_disk / "out" / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def _other_tokenizer(model: Path, data: Path, tmp_path: Path) -> None:
    write_sequences(tmp_path / "train.hdf5", [sequence(20, seed=1)], 20)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    (tmp_path / "metadata.yaml").write_text("template: sft-chat\n")
    run(model, tmp_path, tmp_path / "out")


def _larger_vocabulary(model: Path, data: Path, tmp_path: Path) -> None:
    tokens = sequence(20, seed=1)
    tokens.input_ids[3] = 5000
    write_sequences(tmp_path / "train.hdf5", [tokens], 20)
    run(model, tmp_path / "train.hdf5", tmp_path / "out")


def _no_end_token(model: Path, data: Path, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "endless")
    (directory / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    run(directory, data, tmp_path / "out", template="tokenizer")


def _quantized(model: Path, data: Path, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "small")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    run(directory, data, tmp_path / "out")


def _taken(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    run(model, data, tmp_path)


def _too_long(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, tmp_path / "out", max_length=1024)


def _nan_weights(model: Path, data: Path, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "nan")
    weights = load_file(directory / "model.safetensors")
    weights["transformer.ln_f.weight"][3] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    run(directory, data, tmp_path / "out")


def _too_large(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, tmp_path / "out", batch=2**22, accumulation=1)


def _no_share(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, tmp_path / "out", equal_shares=("fr", "en"))


def _truncated(model: Path, data: Path, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "cut")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run(directory, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("attempt", "error", "said"),
    [
        (_other_tokenizer, DataError, "made by another tokenizer"),
        (_larger_vocabulary, DataError, "holds token 5000"),
        (_no_end_token, CallerError, "no end token"),
        (_quantized, InvalidSetting, "is quantized"),
        (_taken, TrainingError, "is not empty"),
        (_too_long, InvalidSetting, "do not fit the model's context of 256"),
        (_nan_weights, TrainingError, "not finite before the first step"),
        (_too_large, TrainingError, "training would take about .* of memory .*; this would fit: --micro-batch"),
        (_no_share, InvalidSetting, "there is no fr: give --data fr=SOURCE"),
        (_truncated, CheckpointError, "truncated"),
    ],
)
def test_what_is_refused(
    attempt: Callable[[Path, Path, Path], None], error: type[Exception], said: str, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        attempt(model, data, tmp_path)
    assert not (tmp_path / "out" / "config.json").exists()
