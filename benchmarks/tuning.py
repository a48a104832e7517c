"""Prompt tuning through a swarm: beside PEFT in one process and beside Petals, what it needs, what it makes of a model, and what
it costs the chats beside it. Real processes over real hivemind.

    python benchmarks/tuning.py [--petals-python PYTHON] [--data FILE] [--only PART ...] [--json FILE]

PYTHON is an interpreter that has Petals (make_petals_peer.sh makes one), FILE is PersonaChat, ConvAI2's text; without them those
rows are left out. The parts, each of which may be measured by itself:

step      tokens a second of a step of AdamW, forward and backward, and the memory of who takes it; its speed counts when its losses
          are PEFT's
quality   the held-out loss of the default model after `corolla tune` through two servers; the run stays in --run DIR
peft      the held-out loss after PEFT's prompt tuning in one process, with the data, the first prompt and the steps of that run
chats     a chat's time per token alone, beside one who trains through the same servers without a pause, and beside two
session   tokens a second of `generate(session=...)` beside the tokens' way through the same servers, and of beams
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from common import Table
from corolla.models.catalog import resolve
from swarm_petals import SHAPES
from swarm_servers import COROLLA, Client, CorollaSwarm, PetalsSwarm, Processes, even_spans
from tuning_bench import Bench, layers
from tuning_talk import chats, session

PEFT, PETALS = "PEFT, one process, float32", "Petals, two servers, float32"
FLOAT32, BFLOAT16 = "Corolla, two servers, float32", "Corolla, two servers, bfloat16"
CLOSE, CLOSE_BF16 = 1e-3, 2e-2  # how far losses may be from PEFT's in float32, as a share; Petals predicts one token fewer


def step(bench: Bench) -> None:
    """Tokens a second of a step, and the memory of who takes it."""
    options = bench.options
    answers: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, Processes(Path(folder)) as processes:
        clients = {PEFT: bench.client(processes, "peft", "float32", threads=options.all_threads)}
        for name, dtype in ((FLOAT32, "float32"), (BFLOAT16, "bfloat16")):
            if dtype in options.sides:
                clients[name] = bench.client(processes, "corolla", bench.corolla(processes, dtype).address, dtype)
        if options.petals_python is not None and "petals" in options.sides:
            threads = options.petals_threads or options.threads
            theirs = PetalsSwarm(processes, options.petals_python, bench.directory, bench.spans, threads=threads)
            clients[PETALS] = bench.client(processes, "petals", theirs.address, PetalsSwarm.PREFIX, python=options.petals_python)

        def measure(name: str, client: Client, number: int) -> Mapping[str, float]:
            if number < 0:
                client.send(steps=1, batch=2, length=16)
                client.read()
                return {}
            answer = bench.ask(client)
            answers.setdefault(name, []).append(answer)
            return {name: bench.rate(answer)}

        figures = bench.rounds({name: functools.partial(measure, name, client) for name, client in clients.items()})
    reference = [loss for answer in answers[PEFT] for loss in answer["losses"]]
    for name, given in answers.items():
        losses = [loss for answer in given for loss in answer["losses"]]
        furthest = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
        if furthest > (CLOSE if name == FLOAT32 else CLOSE_BF16):
            raise SystemExit(f"{name}: a loss is {furthest:.1%} away from PEFT's, so its speed does not count")
        bench.table.add(f"ptune step, {name}", "tokens/s", figures[name])
    for title, ours, other, reach, aim in (
        ("Corolla / PEFT", FLOAT32, PEFT, 0.85, 1.0),
        ("Corolla / Petals", FLOAT32, PETALS, 1.5, 1.9),
        ("Corolla, bfloat16 / Petals, float32", BFLOAT16, PETALS, 3.0, 5.0),
    ):
        if ours in figures and other in figures:
            bench.table.ratio(f"ptune step: {title}", "x", figures[ours], figures[other], reach=reach, aim=aim)
    if FLOAT32 not in answers:
        return
    last = answers[FLOAT32][-1]
    beyond = last["resident"] - last["outer"]
    bench.table.add("client's memory beyond embeddings and head, at its highest", "MB", [beyond / 1e6], reach=400.0, at_most=True)
    bench.table.add("of it, torch, transformers and hivemind", "MB", [last["imported"] / 1e6])
    bench.table.add("of it, pages of libraries' files, which processes share", "MB", [last["mapped"] / 1e6])


def quality(bench: Bench) -> None:
    """The held-out loss of the default model after a run, and after PEFT's with the same data, first prompt and steps."""
    options = bench.options
    if options.data is None:
        return
    directory = resolve(options.model)
    out = bench.run
    run = ["--data", str(options.data), "--loss", "all", "--batch", "4", "--max-length", "128", "--seed", "0"]  # as the notebook of Petals
    run += ["--steps", str(options.quality_steps)]
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, Processes(Path(folder)) as processes:
        swarm = CorollaSwarm(processes, directory, even_spans(layers(directory), 2), threads=options.threads, dtype="float32")
        command = [*COROLLA, "tune", options.model, *run, "--dtype", "float32", "--report-to", "none", "--output", str(out)]
        subprocess.run([*command, "--peers", swarm.address], check=True, stdout=subprocess.DEVNULL)
    record = json.loads((out / "tuning.json").read_text())
    bench.table.add("held-out loss without a prompt", "nats", [record["base"]["loss"]])
    ours = record["evaluations"][-1]["loss"]
    bench.table.add(f"after {options.quality_steps} steps, Corolla, two servers", "nats", [ours], reach=2.95, at_most=True)
    bench.table.add("seconds of a step, Corolla, two servers", "s", [statistics.median(point["seconds"] for point in record["curve"])])


def peft(bench: Bench) -> None:
    """PEFT's held-out loss after what `quality` did."""
    if bench.options.data is None:
        return
    record = json.loads((bench.run / "tuning.json").read_text())
    ours, theirs = record["evaluations"][-1]["loss"], peft_held_out(resolve(bench.options.model), record)
    bench.table.add(f"after {record['steps']['total']} steps, PEFT, one process", "nats", [theirs])
    bench.table.add("perplexity: Corolla / PEFT", "x", [math.exp(ours - theirs)], reach=1.02, aim=1.0, at_most=True)


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


PARTS: dict[str, Callable[[Bench], None]] = {"step": step, "quality": quality, "peft": peft, "chats": chats, "session": session}


def end(*_signal: object) -> None:
    """Nothing that was started outlives a time limit."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit("ended by a signal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--petals-python", type=Path, metavar="PYTHON", help="an interpreter that can import petals")
    parser.add_argument("--data", type=Path, metavar="FILE", help="PersonaChat, ConvAI2's text")
    parser.add_argument("--model", default="smollm2", help="of the parts quality, peft and session")
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="petals560")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, beside 16 soft ones")
    parser.add_argument("--steps", type=int, default=3, help="of one measurement")
    parser.add_argument("--quality-steps", type=int, default=100)
    parser.add_argument("--beside-steps", type=int, default=4, help="of a training beside a chat, which has to be over first")
    parser.add_argument("--chat-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--petals-threads", type=int, help="of each of Petals' servers; as many as ours by default")
    parser.add_argument("--client-threads", type=int, default=torch.get_num_threads(), help="of the client of either system")
    sides = ("float32", "bfloat16", "petals")
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, help="of the step part, beside PEFT")
    parser.add_argument("--all-threads", type=int, default=torch.get_num_threads(), help="of PEFT's one process")
    parser.add_argument("--session-tokens", type=int, default=32)
    parser.add_argument("--session-dtype", default="float32", help="of the servers and the client; in float32 the answers are compared")
    parser.add_argument("--run", type=Path, metavar="DIR", help="of the quality part, which stays there; new where that is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same table there")
    options = parser.parse_args()

    settings = {key: value for key, value in vars(options).items() if key not in ("json", "petals_python", "data", "run")}
    packages = {"peft": version("peft")}
    if options.petals_python is not None:
        packages["petals"] = PetalsSwarm.version(options.petals_python)
    signal.signal(signal.SIGTERM, end)
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
