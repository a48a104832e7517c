"""The rows of a step, looked through before they are computed: a server is to blame for what no honest one sends."""

from __future__ import annotations

import torch

from corolla.errors import InvalidSetting, ServerFault
from corolla.models.architecture import Architecture
from corolla.server.ways import Way
from corolla.swarm.wire import StepFrame
from corolla.types import Step

# By dtype: integers of its size, and an infinity's bits as one.
_INFINITY = {torch.float32: (torch.int32, 0x7F800000), torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00)}


def check_shape(arch: Architecture, frame: StepFrame, *, from_client: bool) -> None:
    """Before the rows themselves are touched. Raises like `check_rows`."""
    if frame.hidden is None:
        return
    rows, values = frame.hidden.shape
    problem = ""
    if values != arch.hidden:
        problem = f"rows of {values} values came, and this model's have {arch.hidden}"
    elif frame.start + rows > arch.context_length:
        problem = f"positions came that are outside a context of {arch.context_length}"
    if problem:
        raise InvalidSetting("hidden", problem) if from_client else ServerFault(problem)


def check_rows(arch: Architecture, sender: str, frame: StepFrame, step: Step, way: Way) -> None:
    """Raises `ServerFault` for what no honest server sends, and `InvalidSetting` for rows of a client that no block takes."""
    problem = _problem_of_rows(step, way)
    if way.hop == 0 and sender == way.client:
        if problem:
            raise InvalidSetting("hidden", problem)
        return
    if frame.generation != way.generation:
        problem = f"a step of generation {frame.generation} came, and the session is at {way.generation}"
    elif not frame.tokens and not way.wants_hidden:
        problem = "a step without token ids came"
    elif not all(0 <= token < arch.vocabulary for token in frame.tokens):
        problem = f"token ids came that are outside a vocabulary of {arch.vocabulary}"
    if problem:
        raise ServerFault(problem)


def _problem_of_rows(step: Step, way: Way) -> str | None:
    if not isinstance(step.payload, torch.Tensor):
        return "no hidden states came" if way.hop else None
    return None if _finite(step.payload) else "hidden states came that are NaN or infinite"


def _finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or an infinity: of those, all bits of the exponent are set.

    By NumPy, which computes on the calling thread alone; see `engine.threads`.
    """
    integers, infinity = _INFINITY[values.dtype]
    magnitudes = values.view(integers).numpy() & torch.iinfo(integers).max
    return bool((magnitudes < infinity).all())
