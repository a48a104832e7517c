"""The distributed models by family, and the classes that choose among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    BloomForSequenceClassification,
    BloomModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from corolla.errors import UnsupportedModel
from corolla.models.catalog import resolve
from corolla.remote.base import Distributed, DistributedForCausalLM, DistributedModel

# The stock constructors would make every block: their parents' are called in their place.


class DistributedBloomModel(DistributedModel, BloomModel):
    """BLOOM without its head; its blocks are `h`."""

    config_class = BloomConfig
    blocks_name = "h"

    def __init__(self, config: BloomConfig) -> None:
        super(BloomModel, self).__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.prompts = None
        self.post_init()

    def entering(self, embeddings: torch.Tensor) -> torch.Tensor:
        """See `DistributedModel.entering`."""
        normed: torch.Tensor = self.word_embeddings_layernorm(embeddings)
        return normed

    def leaving(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `DistributedModel.leaving`."""
        normed: torch.Tensor = self.ln_f(hidden)
        return normed


class DistributedBloomForCausalLM(DistributedForCausalLM, BloomForCausalLM):
    """BLOOM; its blocks are `transformer.h`."""

    config_class = BloomConfig

    def __init__(self, config: BloomConfig) -> None:
        super(BloomForCausalLM, self).__init__(config)
        self.transformer = DistributedBloomModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class DistributedBloomForSequenceClassification(Distributed, BloomForSequenceClassification):
    """BLOOM with a classifier's head, `score`, which is trained."""

    config_class = BloomConfig
    made_here = ("score.weight",)

    def __init__(self, config: BloomConfig) -> None:
        super(BloomForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = DistributedBloomModel(config)
        self.score = nn.Linear(config.hidden_size, cast(int, config.num_labels), bias=False)
        self.post_init()


class DistributedLlamaModel(DistributedModel, LlamaModel):
    """Llama without its head; its blocks are `layers`."""

    config_class = LlamaConfig
    blocks_name = "layers"

    def __init__(self, config: LlamaConfig) -> None:
        super(LlamaModel, self).__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.prompts = None
        self.post_init()

    def leaving(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `DistributedModel.leaving`."""
        normed: torch.Tensor = self.norm(hidden)
        return normed


class DistributedLlamaForCausalLM(DistributedForCausalLM, LlamaForCausalLM):
    """Llama; its blocks are `model.layers`."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DistributedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class DistributedLlamaForSequenceClassification(Distributed, LlamaForSequenceClassification):
    """Llama with a classifier's head, `score`, which is trained."""

    config_class = LlamaConfig
    made_here = ("score.weight",)

    def __init__(self, config: LlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DistributedLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, cast(int, config.num_labels), bias=False)
        self.post_init()


class AutoDistributedConfig:
    """A model's configuration, whichever family it is of."""

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Any:
        """transformers' configuration of the model `name`, an alias, a directory or a hub id; weights are not fetched.

        Raises `ModelNotFound`, `CheckpointError`.
        """
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(resolve(str(name), weights=False))


class _Auto:
    _classes: ClassVar[dict[str, type[Distributed]]]

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings: Any) -> Any:
        """The model `name` as the class of its family loads it: see `Distributed.from_pretrained`.

        Raises `UnsupportedModel` for another family, and whatever that raises.
        """
        family = AutoDistributedConfig.from_pretrained(name).model_type
        if family not in cls._classes:
            raise UnsupportedModel(f"{name} is a {family} model; the PyTorch client knows {', '.join(sorted(cls._classes))}")
        return cls._classes[family].from_pretrained(name, **settings)


class AutoDistributedModel(_Auto):
    """A model without its head, of whichever family."""

    _classes: ClassVar[dict[str, type[Distributed]]] = {"bloom": DistributedBloomModel, "llama": DistributedLlamaModel}


class AutoDistributedModelForCausalLM(_Auto):
    """A language model, of whichever family."""

    _classes: ClassVar[dict[str, type[Distributed]]] = {"bloom": DistributedBloomForCausalLM, "llama": DistributedLlamaForCausalLM}


class AutoDistributedModelForSequenceClassification(_Auto):
    """A classifier, of whichever family."""

    _classes: ClassVar[dict[str, type[Distributed]]] = {
        "bloom": DistributedBloomForSequenceClassification,
        "llama": DistributedLlamaForSequenceClassification,
    }
