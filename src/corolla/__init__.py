"""Corolla: a large language model on a swarm of ordinary machines.

The PyTorch client's names are here too; they load torch and transformers when they are first asked for.
"""

from typing import Any

__version__ = "0.1.0"

_REMOTE = {
    "AutoDistributedConfig": "models",
    "AutoDistributedModel": "models",
    "AutoDistributedModelForCausalLM": "models",
    "AutoDistributedModelForSequenceClassification": "models",
    "DistributedBloomForCausalLM": "models",
    "DistributedBloomForSequenceClassification": "models",
    "DistributedBloomModel": "models",
    "DistributedLlamaForCausalLM": "models",
    "DistributedLlamaForSequenceClassification": "models",
    "DistributedLlamaModel": "models",
    "InferenceSession": "session",
    "RemoteSequential": "sequential",
}


def __getattr__(name: str) -> Any:
    if name not in _REMOTE:
        raise AttributeError(f"module 'corolla' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"corolla.remote.{_REMOTE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_REMOTE})
