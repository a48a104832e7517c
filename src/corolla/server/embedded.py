"""A whole model in this process: the embedded default of one machine, spoken to over the local transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from corolla.errors import InvalidSetting
from corolla.models.checkpoint import Progress
from corolla.swarm.local import LocalTransport

PEER = "embedded"
WEIGHTS = ("packed", "plain", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Embedded:
    """An open model: connect to `peer` over `transport`."""

    transport: LocalTransport
    peer: str
    directory: Path
    context_length: int
    vocabulary: int


@contextmanager
def open_model(
    model: str,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    weights: str | None = None,
    batch_invariant: bool = False,
    progress: bool = True,
) -> Iterator[Embedded]:
    """Resolve, load and serve a model until the block ends.

    Args:
        model: an alias, a directory or a hub id.
        dtype: "float32", "bfloat16" or "float16"; by default what the machine computes fast.
        threads: of the CPU's products; torch's default where None.
        weights: one of `WEIGHTS`; by default "packed" on a CPU, "plain" on a CUDA device.
        batch_invariant: answers that do not depend on what else is computed, in bfloat16 too.
        progress: show bars on standard error.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel, InvalidSetting: as their sentences say.
    """
    import torch

    from corolla.engine.engine import Engine, EngineConfig
    from corolla.models.catalog import resolve
    from corolla.models.span import load_span

    if threads is not None:
        if threads < 1:
            raise InvalidSetting("threads", f"{threads} is not at least 1")
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _bar() if progress else nullcontext(_silent) as report:
        directory = resolve(model, progress=report)
        span_model = load_span(
            directory,
            dtype=dtype or fast_dtype(device),
            weights=weights or ("packed" if device == "cpu" else "plain"),  # type: ignore[arg-type]
            device=device,
            progress=lambda done, total: report("loading", done, total),
        )
    engine = Engine(span_model, EngineConfig(batch_invariant=batch_invariant))
    transport = LocalTransport()
    transport.listen(PEER, engine.receive)
    engine.start()
    try:
        yield Embedded(transport, PEER, directory, engine.context_length, span_model.arch.vocabulary)
    finally:
        engine.stop()


def fast_dtype(device: str) -> str:
    """bfloat16 where the machine has instructions for it, else float32."""
    import torch

    from corolla.models.linear import can_pack

    return "bfloat16" if device == "cuda" or can_pack(torch.bfloat16) else "float32"


def _silent(stage: str, done: int, total: int | None) -> None:
    """No progress is shown."""


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar on standard error for what opening a model does: fetching and converting, then loading."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("opening", total=None)
        yield lambda stage, done, total: bars.update(task, description=stage, completed=done, total=total)
