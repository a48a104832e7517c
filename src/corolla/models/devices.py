"""Where a model is computed: on the CPU unless a device is asked for by its name."""

from __future__ import annotations

import logging

import torch

from corolla.errors import InvalidSetting

log = logging.getLogger(__name__)


def settled_device(device: str | None) -> str:
    """The device to compute on: "cpu" where none is named, else the one named, which is there.

    Where nothing is named on a machine with a CUDA device, one line of the log tells how to use it.
    Raises `InvalidSetting` for anything but "cpu", "cuda" and "cuda:N" of a device that this machine has.
    """
    if device is None:
        if torch.cuda.is_available():
            log.warning("computing on the CPU: this machine has a CUDA device, which --device cuda uses")
        return "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InvalidSetting("device", f"{device!r} is no device; give cpu, cuda or cuda:1") from None
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and chosen.index):
        raise InvalidSetting("device", f"{device!r} is not supported; give cpu, cuda or cuda:1")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InvalidSetting("device", f"there is no {device} on this machine, which has {torch.cuda.device_count()} CUDA devices")
    return device
