"""The distributed models by family, and the classes that choose among them.

Those of BLOOM and Llama have names here; of another family that servers compute, the class is made when it is first asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomForCausalLM,
    BloomForSequenceClassification,
    BloomModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from corolla.errors import UnsupportedModel
from corolla.models.catalog import resolve
from corolla.models.families import supported_families
from corolla.remote.modeling import Distributed, DistributedForCausalLM, DistributedForSequenceClassification, DistributedModel, distributed

DistributedBloomModel = distributed(DistributedModel, BloomModel)
DistributedBloomForCausalLM = distributed(DistributedForCausalLM, BloomForCausalLM)
DistributedBloomForSequenceClassification = distributed(DistributedForSequenceClassification, BloomForSequenceClassification)
DistributedLlamaModel = distributed(DistributedModel, LlamaModel)
DistributedLlamaForCausalLM = distributed(DistributedForCausalLM, LlamaForCausalLM)
DistributedLlamaForSequenceClassification = distributed(DistributedForSequenceClassification, LlamaForSequenceClassification)


class AutoDistributedConfig:
    """A model's configuration, whichever family it is of."""

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Any:
        """transformers' configuration of the model `name`, an alias, a directory or a hub id; weights are not fetched.

        Raises `ModelNotFound`, `CheckpointError`.
        """
        return AutoConfig.from_pretrained(resolve(str(name), weights=False))


class _Auto:
    _ours: ClassVar[type[Distributed]]
    _stock: ClassVar[Any]  # transformers' class that chooses

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings: Any) -> Any:
        """The model `name` as the class of its family loads it: see `Distributed.from_pretrained`.

        Raises `UnsupportedModel` for a family whose blocks no server computes, and whatever that raises.
        """
        config = AutoDistributedConfig.from_pretrained(name)
        if config.model_type not in supported_families() or type(config) not in cls._stock._model_mapping:
            raise UnsupportedModel(f"{name} is a {config.model_type} model; the PyTorch client knows {', '.join(supported_families())}")
        return distributed(cls._ours, cls._stock._model_mapping[type(config)]).from_pretrained(name, **settings)


class AutoDistributedModel(_Auto):
    """A model without its head, of whichever family."""

    _ours, _stock = DistributedModel, AutoModel


class AutoDistributedModelForCausalLM(_Auto):
    """A language model, of whichever family."""

    _ours, _stock = DistributedForCausalLM, AutoModelForCausalLM


class AutoDistributedModelForSequenceClassification(_Auto):
    """A classifier, of whichever family."""

    _ours, _stock = DistributedForSequenceClassification, AutoModelForSequenceClassification
