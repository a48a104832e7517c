"""The rows of a step, looked through before they are computed: a server is to blame for what no honest one sends."""

from __future__ import annotations

import torch

from corolla.errors import InvalidSetting, ServerFault
from corolla.messages import StepFrame
from corolla.models.config import ModelConfig
from corolla.server.session_table import SessionRoute
from corolla.types import Step

# By dtype: integers of its size, and an infinity's bits as one.
_INFINITY = {torch.float32: (torch.int32, 0x7F800000), torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00)}


def check_shape(arch: ModelConfig, frame: StepFrame, *, from_client: bool) -> None:
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


def check_rows(arch: ModelConfig, sender: str, frame: StepFrame, step: Step, way: SessionRoute) -> None:
    """Raises `ServerFault` for what no honest server sends, and `InvalidSetting` for what no server takes of a client."""
    problem = _problem_of_rows(step, way) or _problem_of_tokens(arch, frame)
    if not problem and not frame.route:
        problem = _problem_of_ring(frame, way)
    if not problem and way.hop and not frame.tokens and not way.wants_hidden:
        problem = "a step without token ids came"
    if problem:
        raise InvalidSetting("step", problem) if way.from_client(sender) else ServerFault(problem)


def _problem_of_rows(step: Step, way: SessionRoute) -> str | None:
    if not isinstance(step.payload, torch.Tensor):
        return "no hidden states came" if way.hop else None
    return None if _finite(step.payload) else "hidden states came that are NaN or infinite"


def _problem_of_tokens(arch: ModelConfig, frame: StepFrame) -> str | None:
    outside = next((token for token in frame.tokens if not 0 <= token < arch.vocabulary), None)
    return None if outside is None else f"{outside} is no token of a vocabulary of {arch.vocabulary}"


def _problem_of_ring(frame: StepFrame, way: SessionRoute) -> str | None:
    """A step round the ring follows the last one of its generation: the token that was sampled after it, and guesses."""
    if frame.generation != way.generation:
        return f"a step of generation {frame.generation} came, and the session is at {way.generation}"
    if frame.start > way.end:
        return f"rows from position {frame.start} on came, and those before had ended at {way.end}"
    if len(frame.tokens) - frame.drafts != 1:
        return f"{len(frame.tokens)} tokens came of which {frame.drafts} are guesses, in place of one token and guesses"
    return None


def _finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or an infinity: of those, all bits of the exponent are set.

    By NumPy, which computes on the calling thread alone; see `engine.threads`.
    """
    integers, infinity = _INFINITY[values.dtype]
    magnitudes = values.view(integers).numpy() & torch.iinfo(integers).max
    return bool((magnitudes < infinity).all())
