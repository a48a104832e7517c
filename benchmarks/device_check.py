"""Proves that a device computes what it should, in under eight minutes on a GPU: run it before `--device cuda` serves anybody.

    python benchmarks/device_check.py --device cuda --report DIR [--quick]

Tiny random models of every family, whole and in spans, against stock transformers on the CPU; nf4, int8 and int4; bfloat16; CUDA graphs
against the same operations without them; a soft prompt's gradients; an answer whose server dies. Then BLOOM's 560m shape, its tokens per
second. Each check is a line with its time; DIR gets report.md and report.json. The exit code is 1 where a check failed or was not run.
`--quick` takes three families and leaves the table out; `--device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests' tiny models and swarms

import bloom_shapes
from common import Table, describe_machine, package_versions
from corolla.barrier import barrier
from corolla.errors import InvalidSetting
from corolla.models.devices import settled_device
from corolla.models.linear import WeightFormat
from corolla.models.reference import Reference
from corolla.remote.models import AutoDistributedModelForCausalLM
from tests.engine.driving import Chain
from tests.models import tiny
from tests.server.ring import SAMPLED, SETTINGS, Swarm, answer

FLOAT32 = 2e-3  # of a logit; the tiny models' spread over some 5
BFLOAT16 = 0.15
QUICK = ("llama", "bloom", "gemma3")
TOKENS = 24
PROMPTS = [[5 + i * 11 % 180 for i in range(40)], [7, 8, 9]]


class CheckFailed(Exception):
    """The device computed something else; the sentence says what."""


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    outcome: str  # passed, failed or not run
    seconds: float
    detail: str


@dataclass(slots=True)
class Checks:
    """Runs one check after another, shows each as it ends, and keeps what came of it."""

    limit: float  # seconds for all of them
    began: float
    results: list[Result]

    def run(self, name: str, check: Callable[[], str]) -> None:
        left = self.limit - (time.perf_counter() - self.began)
        if left <= 0:
            self._add(Result(name, "not run", 0.0, f"the {self.limit:.0f} s were over"))
            return
        began, problems, detail = time.perf_counter(), list[str](), ""
        with barrier(name, lambda error: problems.append(f"{type(error).__name__}: {error}")):
            try:
                detail = check()
            except CheckFailed as failed:
                problems.append(str(failed))
        outcome = "failed" if problems else "passed"
        self._add(Result(name, outcome, time.perf_counter() - began, " ".join((problems or [detail])[0].split())))

    def _add(self, result: Result) -> None:
        self.results.append(result)
        print(f"{result.outcome:<8}{result.seconds:7.1f} s  {result.name}: {result.detail}", flush=True)

    @property
    def passed(self) -> bool:
        return all(result.outcome == "passed" for result in self.results)


def within(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> float:
    """The greatest difference. Raises `CheckFailed` beyond the tolerance, and for what is not finite."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    difference = float((found - expected).abs().max())
    if not math.isfinite(difference) or difference > tolerance:
        raise CheckFailed(f"{what} differ by {difference:.2e}, more than {tolerance:g}")
    return difference


def follow(chain: Chain, tokens: list[int], start: int) -> torch.Tensor:
    """The logits [tokens from `start` on, V] as decoding gives them: a token at a time, after a prompt, beside another session."""
    chain.tables.clear()
    made = [chain.step({0: tokens[:start], 1: PROMPTS[1]})[0]]
    made += [chain.step({0: [token], 1: [token]})[0] for token in tokens[start:]]
    return torch.stack(made)


def exact(family: str, device: str, directory: Path) -> str:
    """Decoded and in one piece, whole and in three spans, against the stock model in float32."""
    reference = Reference(directory)
    start = len(PROMPTS[0])
    tokens = PROMPTS[0] + reference.greedy(PROMPTS[0], TOKENS)
    stock = Reference(directory).forward(tokens)
    worst = 0.0
    for cuts in ([4], [1, 3, 4]):
        chain = Chain.load(directory, cuts, dtype="float32", weights=lossless(device), device=device)
        worst = max(worst, within(chain.all_logits(tokens), stock, FLOAT32, f"logits of a prompt through {len(cuts)} spans"))
        decoded = follow(chain, tokens, start)
        worst = max(worst, within(decoded, stock[start - 1 :], FLOAT32, f"logits of decoding through {len(cuts)} spans"))
    return f"{family}, greatest difference {worst:.1e}"


def lossless(device: str) -> WeightFormat:
    return "packed" if device == "cpu" else "plain"


def quantized(form: WeightFormat, device: str, directory: Path) -> str:
    """On the device and on the CPU, from the same codes."""
    tokens = [*PROMPTS[0], *PROMPTS[1]]
    try:
        chain = Chain.load(directory, [1, 4], dtype="float32", weights=form, device=device)
    except InvalidSetting as refused:
        if form == "int4" and device != "cpu":
            return f"refused, as documented: {refused}"
        raise
    expected = Chain.load(directory, [4], dtype="float32", weights=form).all_logits(tokens)
    worst = within(chain.all_logits(tokens), expected, FLOAT32, "logits of a prompt")
    worst = max(worst, within(follow(chain, tokens, 40), expected[39:], FLOAT32, "logits of decoding"))
    return f"greatest difference to the CPU {worst:.1e}"


def half(device: str, directory: Path) -> str:
    tokens = PROMPTS[0]
    chain = Chain.load(directory, [2, 4], dtype="bfloat16", weights=lossless(device), device=device)
    expected = Reference(directory).forward(tokens)
    mean = float((chain.all_logits(tokens).float().cpu() - expected).abs().mean())
    if not mean < BFLOAT16:
        raise CheckFailed(f"logits in bfloat16 differ by {mean:.3f} on average from float32, more than {BFLOAT16}")
    return f"{mean:.3f} from float32 on average"


def graphs(device: str, directory: Path, form: WeightFormat) -> str:
    """Of four numbers of sessions, decoded together: on a GPU as graphs, against the executor in fixed shapes, which has none."""
    worst = 0.0
    for count in (1, 2, 5, 9):
        generator = random.Random(count)
        steps: list[dict[int, Sequence[int]]] = [{i: [generator.randrange(3, tiny.VOCABULARY) for _ in range(5 + i)]} for i in range(count)]
        steps += [{i: [generator.randrange(3, tiny.VOCABULARY)] for i in range(count)} for _ in range(12)]
        replayed = Chain.load(directory, [4], dtype="float32", weights=form, device=device)
        plain = Chain.load(directory, [4], dtype="float32", weights=form, device=device, batch_invariant=True)
        for payload in steps:
            found, expected = (chain.step(payload) for chain in (replayed, plain))
            for session in payload:
                worst = max(worst, within(found[session], expected[session], FLOAT32, f"logits of {count} sessions"))
    how = "replayed as graphs" if device != "cpu" else "without graphs, which a CPU has none of"
    return f"{how}, greatest difference {worst:.1e}"


def gradients(device: str, directory: Path) -> str:
    """Of a deep prompt: blocks on the device, embeddings and head on the CPU."""
    ids = torch.tensor([PROMPTS[0]])
    found = []
    for where in (device, "cpu"):
        torch.manual_seed(0)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            directory, torch_dtype="float32", tuning_mode="deep_ptune", pre_seq_len=4, device=where
        )
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss, model.bare.prompts.tokens.grad, model.bare.prompts.deep.grad))
        model.close()
    worst = max(within(one, other, FLOAT32, "loss and gradients") for one, other in zip(*found, strict=True))
    return f"greatest difference to the CPU {worst:.1e}"


def recovery(device: str, directory: Path) -> str:
    """An answer whose server dies in mid-token has the tokens of one that nothing happened to."""
    for settings in (SETTINGS, SAMPLED):
        with swarm(directory, device) as undisturbed:
            expected = answer(undisturbed, settings)
        with swarm(directory, device) as disturbed:
            found = answer(disturbed, settings, at={6: lambda: disturbed.kill("b")})
        if found != expected:
            raise CheckFailed(f"tokens {found} came where {expected} were expected")
    return "the same tokens, greedy and sampled"


@contextmanager
def swarm(directory: Path, device: str) -> Iterator[Swarm]:
    made = Swarm(directory, device=device)
    try:
        for name, (start, end), throughput in (("a", (0, 2), 100.0), ("b", (2, 4), 1000.0), ("c", (2, 4), 10.0)):
            made.add(name, start, end, throughput)
        yield made
    finally:
        made.close()


def bloom_table(options: argparse.Namespace, tables: list[str]) -> str:
    formats = [lossless(options.device), "int8", "nf4"]
    dtype = "bfloat16" if options.device != "cpu" else "float32"
    shapes = argparse.Namespace(
        shape=["560m"], vocabulary=32_000, dtype=dtype, formats=formats, device=options.device, repeats=2, threads=1, alone=False
    )
    table = Table("device_check", vars(shapes))
    with tempfile.TemporaryDirectory() as temporary:
        found = bloom_shapes.measure("560m", Path(temporary) / "560m", shapes)
    bloom_shapes.fill(table, "560m", found, shapes)
    tables += [table.markdown(), bloom_shapes.summary({"560m": found}, shapes)]
    return f"{len(table.rows)} figures"


def report(directory: Path, options: argparse.Namespace, checks: Checks, tables: list[str]) -> None:
    seconds = time.perf_counter() - checks.began
    machine, versions = describe_machine(), package_versions()
    verdict = "All checks passed." if checks.passed else "**Some checks failed or were not run.**"
    lines = [f"# Device check: {options.device}", "", f"{verdict} {seconds:.0f} s.", ""]
    lines += [f"- {name}: {value}" for name, value in (machine | versions).items()]
    lines += ["", "| check | outcome | seconds | detail |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.outcome} | {r.seconds:.1f} | {r.detail.replace('|', '/')} |" for r in checks.results]
    lines += [part for table in tables for part in ("", table)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "device": options.device,
        "quick": options.quick,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "passed": checks.passed,
        "seconds": seconds,
        "machine": machine,
        "versions": versions,
        "checks": [asdict(result) for result in checks.results],
    }
    (directory / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="cuda, cuda:1 or cpu")
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="where report.md and report.json go")
    parser.add_argument("--quick", action="store_true", help="three families, and no table")
    parser.add_argument("--limit", type=float, default=480.0, metavar="SECONDS", help="checks that would begin later are not run")
    options = parser.parse_args()
    try:
        settled_device(options.device)
    except InvalidSetting as error:
        parser.error(str(error))
    transformers.logging.disable_progress_bar()
    checks, tables, device = Checks(options.limit, time.perf_counter(), []), list[str](), options.device
    families = QUICK if options.quick else tuple(tiny.CONFIGS)
    with tempfile.TemporaryDirectory() as temporary:
        # A width that nf4 and int4 fit; a vocabulary of its own for every family.
        paths = {family: tiny.save(family, Path(temporary) / family) for family in families}
        wide = tiny.save("llama", Path(temporary) / "wide", intermediate_size=128)
        for family in families:
            checks.run(f"{family} is exact", lambda family=family: exact(family, device, paths[family]))  # type: ignore[misc]
        formats: tuple[WeightFormat, ...] = ("int8", "nf4", "int4")
        for form in formats:
            checks.run(f"{form} weights", lambda form=form: quantized(form, device, wide))  # type: ignore[misc]
        checks.run("bfloat16", lambda: half(device, wide))
        for form in (lossless(device), *formats[:2]):
            checks.run(f"decoding of several sessions, {form}", lambda form=form: graphs(device, wide, form))  # type: ignore[misc]
        checks.run("a prompt's gradients", lambda: gradients(device, paths["llama"]))
        checks.run("recovery", lambda: recovery(device, paths["llama"]))
    report(options.report, options, checks, tables)  # the table takes longest: what is known by now is kept whatever becomes of it
    if not options.quick:
        checks.run("BLOOM's 560m shape", lambda: bloom_table(options, tables))
    report(options.report, options, checks, tables)
    print("\n".join(["", *tables, "", f"the report is in {options.report}", "passed" if checks.passed else "FAILED"]))
    return 0 if checks.passed else 1


if __name__ == "__main__":
    sys.exit(main())
