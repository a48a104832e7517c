"""The two files in which PEFT saves what it trains: a configuration, and tensors as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from corolla.errors import CallerError
from corolla.models.json_files import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def read_config(path: Path, kind: str, what: str, error: type[CallerError]) -> dict[str, Any]:
    """The configuration of a directory that holds `what`. Raises `error` where it is missing, damaged, or not of PEFT's `kind`."""
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise error(f"{path} is missing: give a directory that a {what} was saved to") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem}): save the {what} again") from None
    found = config.get("peft_type") if isinstance(config, dict) else None
    if found != kind:
        raise error(f"{path} describes {found or 'no adapter'}, and only {kind} is a {what}")
    return dict(config)


def read_tensors(path: Path, what: str, error: type[CallerError]) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """All tensors of a file by name, and its metadata. Raises `error` where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # it is no mapping
    except FileNotFoundError:
        raise error(f"{path} is missing: give a directory that a {what} was saved to as safetensors") from None
    except (OSError, SafetensorError) as problem:
        raise error(f"{path} is damaged or cut short ({problem}): save the {what} again") from None
