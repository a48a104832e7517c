"""A whole model in this process: the embedded default of one machine, spoken to over the local transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from corolla.errors import InvalidSetting
from corolla.models.checkpoint import Progress
from corolla.swarm.local import LocalTransport

PEER = "embedded"
_SESSIONS = 128  # tokens a second rise up to there: of SmolLM2 on 2 cores 216 with 16 sessions, 289 with 32, 342 with 64, 370 with 128


@dataclass(frozen=True, slots=True)
class Embedded:
    """An open model: connect to `peer` over `transport`."""

    transport: LocalTransport
    peer: str
    directory: Path
    context_length: int
    vocabulary: int
    cache_tokens: int  # of all sessions together
    sessions: int  # at once, for the most tokens a second


@contextmanager
def open_model(
    model: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    weights: str | None = None,
    batch_invariant: bool = False,
    progress: Progress | None = None,
) -> Iterator[Embedded]:
    """Resolve, load and serve a model until the block ends.

    Args:
        model: an alias, a directory or a hub id.
        dtype: "float32", "bfloat16" or "float16"; by default what the machine computes fast.
        device: "cpu", "cuda" or "cuda:1"; the CPU by default.
        threads: of the CPU's products; torch's default where None.
        weights: a `models.linear.WeightFormat`; by default "packed" on a CPU, "plain" on a CUDA device.
        batch_invariant: answers that do not depend on what else is computed, in bfloat16 too.
        progress: told of fetching (in bytes) and loading (in blocks).

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel, InvalidSetting: as their sentences say.
    """
    import torch

    from corolla.engine.engine import Engine, EngineConfig
    from corolla.engine.threads import GoOn, on_passing_thread
    from corolla.models.catalog import resolve
    from corolla.models.devices import settled_device
    from corolla.models.span import load_span

    if threads is not None:
        if threads < 1:
            raise InvalidSetting("threads", f"{threads} is not at least 1")
        torch.set_num_threads(threads)
    settled = settled_device(device)
    directory = resolve(model, progress=progress)

    def prepare(go_on: GoOn) -> Engine:
        def told(done: int, total: int) -> None:
            go_on()
            if progress is not None:
                progress("loading", done, total)

        span_model = load_span(
            directory,
            dtype=dtype or fast_dtype(settled),
            weights=weights,  # type: ignore[arg-type]
            device=settled,
            progress=told,
        )
        return Engine(span_model, EngineConfig(batch_invariant=batch_invariant))

    engine = on_passing_thread(prepare)
    transport = LocalTransport()
    transport.listen(PEER, engine.receive)
    engine.start()
    try:
        vocabulary = engine.model.arch.vocabulary
        yield Embedded(transport, PEER, directory, engine.context_length, vocabulary, engine.config.cache_tokens, _SESSIONS)
    finally:
        engine.stop()


def fast_dtype(device: str) -> str:
    """bfloat16 where the device has instructions for it, else float32."""
    import torch

    from corolla.models.linear import can_pack

    return "bfloat16" if torch.device(device).type == "cuda" or can_pack(torch.bfloat16) else "float32"
