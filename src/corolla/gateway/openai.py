"""OpenAI's interface: models, chat completions and completions, whole or as server-sent events.

What an option means that other servers have beside OpenAI's (`top_k`, `repetition_penalty`) is vLLM's meaning. Options that would
change the answer and that Corolla lacks are refused; those that would not are ignored.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from corolla.errors import InvalidSetting, ModelNotFound
from corolla.gateway.bodies import StrictRoute
from corolla.gateway.error_responses import ANSWERING, documented
from corolla.gateway.service import TheGateway
from corolla.types import GenerationSettings

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ANSWERING, route_class=StrictRoute)
MOST_CHOICES = 16
_SEED = 2**63
_STARTED = int(time.time())


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class Sampling(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    soft_prompt: str | None = Field(None, description="Beside OpenAI's options: a soft prompt of this gateway, by its name.")

    def refuse_unknown(self) -> None:
        """Raises `InvalidSetting` for options that would change the answer and cannot."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise InvalidSetting(name, "Corolla has none; repetition_penalty is the nearest thing")

    def settings(self, choice: int, most: int, stop_ids: tuple[int, ...], stops: tuple[str, ...] = (), **more: Any) -> GenerationSettings:
        """Of the answer number `choice`, of at most `most` tokens. Raises `InvalidSetting`."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = secrets.randbelow(2**31) if self.seed is None else (self.seed + choice) % _SEED
        return GenerationSettings.parse(
            max_new_tokens=most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k in (0, -1) else self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            stop=[*stops, *(text for text in stop if text)],
            stop_token_ids=stop_ids,
            **more,
        )


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "corolla"
    context_length: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/models")
async def models(gateway: TheGateway) -> ModelList:
    """The models that are served here."""
    return ModelList(data=[Model(id=model.name, created=_STARTED, context_length=model.context_length) for model in gateway.models])


@router.get("/models/{model:path}", responses=documented(404))
async def model(gateway: TheGateway, model: str) -> Model:
    """One model."""
    if not model:
        raise ModelNotFound("name a model")
    found = gateway.models.named(model)
    return Model(id=found.name, created=_STARTED, context_length=found.context_length)
