"""Prompt tuning through a swarm: beside PEFT in one process and beside Petals, what it needs, what it makes of a model, and what
it costs the chats beside it. Real processes over real hivemind.

    python benchmarks/tuning.py [--petals-python PYTHON] [--data FILE] [--only step quality chats session] [--json FILE]

PYTHON is an interpreter that has Petals (make_petals_peer.sh makes one), FILE is PersonaChat, ConvAI2's text; without them those
rows are left out. A step is one of AdamW, forward and backward; its speed counts when its losses are PEFT's.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from common import Table, rounds
from corolla.models.catalog import resolve
from runners import median_gap_ms
from swarm_petals import SHAPES, Shape, make_bloom
from swarm_servers import COROLLA, Client, CorollaSwarm, PetalsSwarm, Processes, even_spans

HERE = Path(__file__).parent
TINY = Shape("a tiny BLOOM", 64, 4, 4, 24, (1,), single=(0, 0), together=(0, 0))
CLOSE, CLOSE_BF16 = 1e-3, 2e-2  # how far losses may be from PEFT's in float32, as a share; Petals predicts one token fewer


class Bench:
    """Settings, the table, and what the parts start."""

    def __init__(self, options: argparse.Namespace, table: Table, folder: Path) -> None:
        self.options, self.table, self.folder = options, table, folder
        self.shape = TINY if options.shape == "tiny" else SHAPES[options.shape]
        self.directory = folder / "bloom"
        make_bloom(self.directory, self.shape, "float32")

    @property
    def spans(self) -> list[tuple[int, int]]:
        return even_spans(self.shape.blocks, 2)

    def corolla(self, processes: Processes, dtype: str) -> CorollaSwarm:
        return CorollaSwarm(processes, self.directory, self.spans, threads=self.options.threads, dtype=dtype)

    def client(self, processes: Processes, kind: str, *arguments: str, python: Path | str = sys.executable, threads: int = 1) -> Client:
        return Client(processes, [str(python), str(HERE / "tuning_peer.py"), kind, str(threads), str(self.directory), *arguments])

    def ask(self, client: Client) -> dict[str, Any]:
        client.send(steps=self.options.steps, batch=self.options.batch, length=self.options.length)
        return client.read()

    def rate(self, answer: Mapping[str, Any]) -> float:
        """Tokens a second, soft ones not counted."""
        return self.options.batch * self.options.length / statistics.median(answer["seconds"])


def step(bench: Bench) -> None:
    """Tokens a second of a step, and the memory of who takes it."""
    options = bench.options
    answers: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, Processes(Path(folder)) as processes:
        clients = {"PEFT, one process, float32": bench.client(processes, "peft", "float32", threads=options.all_threads)}
        for dtype in ("float32", "bfloat16"):
            address = bench.corolla(processes, dtype).address
            clients[f"Corolla, two servers, {dtype}"] = bench.client(processes, "corolla", address, dtype)
        if options.petals_python is not None:
            theirs = PetalsSwarm(processes, options.petals_python, bench.directory, bench.spans, threads=options.threads)
            clients["Petals, two servers, float32"] = bench.client(
                processes, "petals", theirs.address, PetalsSwarm.PREFIX, python=options.petals_python
            )

        def measure(name: str, client: Client, number: int) -> Mapping[str, float]:
            answer = bench.ask(client)
            answers.setdefault(name, []).append(answer)
            return {name: bench.rate(answer)}

        figures = rounds(options.rounds, {name: functools.partial(measure, name, client) for name, client in clients.items()})
    reference = [loss for answer in answers["PEFT, one process, float32"] for loss in answer["losses"]]
    for name, given in answers.items():
        losses = [loss for answer in given for loss in answer["losses"]]
        furthest = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
        if furthest > (CLOSE if name.startswith("Corolla") and name.endswith("float32") else CLOSE_BF16):
            raise SystemExit(f"{name}: a loss is {furthest:.1%} away from PEFT's, so its speed does not count")
        bench.table.add(f"ptune step, {name}", "tokens/s", figures[name])
    ours = figures["Corolla, two servers, float32"]
    bench.table.ratio("ptune step: Corolla / PEFT", "x", ours, figures["PEFT, one process, float32"], reach=0.85, aim=1.0)
    if "Petals, two servers, float32" in figures:
        petals = figures["Petals, two servers, float32"]
        bench.table.ratio("ptune step: Corolla / Petals", "x", ours, petals, reach=1.5, aim=1.9)
        bf16 = figures["Corolla, two servers, bfloat16"]
        bench.table.ratio("ptune step: Corolla, bfloat16 / Petals, float32", "x", bf16, petals, reach=3.0, aim=5.0)
    last = answers["Corolla, two servers, float32"][-1]
    beyond = last["resident"] - last["outer"]
    bench.table.add("client's memory beyond embeddings and head", "MB", [beyond / 1e6], reach=400.0, at_most=True)
    bench.table.add("of it, torch, transformers and hivemind", "MB", [last["imported"] / 1e6])


def quality(bench: Bench) -> None:
    """The held-out loss of the default model after a run, and after PEFT's with the same data, first prompt and steps."""
    options = bench.options
    if options.data is None:
        return
    directory = resolve(options.model)
    blocks = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    out = bench.folder / "prompt"
    run = ["--data", str(options.data), "--steps", str(options.quality_steps), "--batch", "4", "--max-length", "128", "--seed", "0"]
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, Processes(Path(folder)) as processes:
        swarm = CorollaSwarm(processes, directory, even_spans(blocks, 2), threads=options.threads, dtype="float32")
        command = [*COROLLA, "tune", options.model, *run, "--dtype", "float32", "--report-to", "none", "--out", str(out)]
        subprocess.run([*command, "--peers", swarm.address], check=True, stdout=subprocess.DEVNULL)
    record = json.loads((out / "tuning.json").read_text())
    theirs = peft_held_out(directory, record)
    ours = record["evaluations"][-1]["loss"]
    bench.table.add("held-out loss without a prompt", "nats", [record["base"]["loss"]])
    bench.table.add(f"after {options.quality_steps} steps, Corolla, two servers", "nats", [ours], reach=2.95, at_most=True)
    bench.table.add(f"after {options.quality_steps} steps, PEFT, one process", "nats", [theirs])
    bench.table.add("perplexity: Corolla / PEFT", "x", [math.exp(ours - theirs)], reach=1.02, aim=1.0, at_most=True)
    bench.table.add("seconds of a step, Corolla, two servers", "s", [statistics.median(point["seconds"] for point in record["curve"])])


def peft_held_out(directory: Path, record: Mapping[str, Any]) -> float:
    """The held-out loss after PEFT's prompt tuning in this process, in a plain loop."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    from corolla.chat.templates import template_named
    from corolla.data.problems import Problems
    from corolla.data.tokens import TrainingTokenizer
    from corolla.remote.prompts import soft_prompts
    from corolla.tuning.dialogues import DataSettings, collate, in_order, load_dialogues

    settings = record["settings"]
    read = DataSettings(**{name: settings[name] for name in DataSettings.__dataclass_fields__})
    dialogues = load_dialogues(read, TrainingTokenizer(directory), template_named(settings["template"]), Problems())
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model: Any = get_peft_model(stock, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=settings["prompt_tokens"]))
    tokens = model.prompt_encoder["default"].embedding.weight
    torch.manual_seed(read.seed)
    with torch.no_grad():
        tokens.copy_(soft_prompts("ptune", len(tokens), stock.get_input_embeddings().weight, 1).tokens)
    optimizer = torch.optim.AdamW([tokens], lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
    steps, batch = record["steps"]["total"], settings["batch"]
    schedule = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    order = in_order(dialogues.training.articles, steps, batch, read.seed)
    for begin in range(0, len(order), batch):
        model(**collate(order[begin : begin + batch])).loss.backward()
        torch.nn.utils.clip_grad_norm_([tokens], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    total, count = 0.0, 0
    with torch.no_grad():
        for article in dialogues.held_out.articles:
            inputs = collate([article])
            trained = int((inputs["labels"] != -100).sum())
            total, count = total + float(model(**inputs).loss) * trained, count + trained
    return total / count


def chats(bench: Bench) -> None:
    """A chat's time per token alone, and while somebody trains through the same servers without a pause."""
    options = bench.options
    random = Random(0)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, Processes(Path(folder)) as processes:
        swarm = bench.corolla(processes, "float32")
        chat, tuning = swarm.client(), bench.client(processes, "corolla", swarm.address, "float32")

        def gap() -> float:
            return median_gap_ms(chat.answer([random.randrange(5, 1000) for _ in range(16)], options.chat_tokens))

        def measure(_number: int) -> Mapping[str, float]:
            alone = bench.rate(bench.ask(tuning))
            quiet = gap()
            tuning.send(steps=options.beside_steps, batch=options.batch, length=options.length)
            beside = gap()
            return {"quiet": quiet, "beside": beside, "alone": alone, "slowed": bench.rate(tuning.read())}

        figures = rounds(options.rounds, {"chats": measure})
    bench.table.add("a chat's time per token, alone", "ms", figures["quiet"])
    bench.table.add("the same beside training", "ms", figures["beside"])
    bench.table.ratio("a chat beside training / alone", "x", figures["beside"], figures["quiet"])
    bench.table.ratio("a step beside a chat / alone", "x", figures["slowed"], figures["alone"])


PARTS: dict[str, Callable[[Bench], None]] = {"step": step, "quality": quality, "chats": chats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--petals-python", type=Path, metavar="PYTHON", help="an interpreter that can import petals")
    parser.add_argument("--data", type=Path, metavar="FILE", help="PersonaChat, ConvAI2's text")
    parser.add_argument("--model", default="smollm2", help="of the quality part")
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="petals560")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, beside 16 soft ones")
    parser.add_argument("--steps", type=int, default=3, help="of one measurement")
    parser.add_argument("--quality-steps", type=int, default=100)
    parser.add_argument("--beside-steps", type=int, default=4, help="of a training beside a chat, which has to be over first")
    parser.add_argument("--chat-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--all-threads", type=int, default=torch.get_num_threads(), help="of PEFT's one process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()

    settings = {key: value for key, value in vars(options).items() if key not in ("json", "petals_python", "data")}
    packages = {"peft": version("peft")}
    if options.petals_python is not None:
        packages["petals"] = PetalsSwarm.version(options.petals_python)
    transformers.logging.disable_progress_bar()
    print(shlex.join(sys.argv), file=sys.stderr)
    table = Table("tuning", settings, packages)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, table, Path(folder))
        for name in options.only:
            print(name, file=sys.stderr, flush=True)
            PARTS[name](bench)
    table.report(options.json)


if __name__ == "__main__":
    main()
