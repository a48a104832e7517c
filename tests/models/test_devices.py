"""Which device is computed on."""

from __future__ import annotations

import logging

import pytest
import torch

from corolla.errors import InvalidSetting
from corolla.models.devices import settled_device


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's answers on a machine with one CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_gpu")
def test_a_cuda_device_is_used_only_where_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert settled_device("cuda:0") == "cuda:0"
    assert settled_device("cpu") == "cpu"
    assert not caplog.messages
    assert settled_device(None) == "cpu"
    assert caplog.messages == ["computing on the CPU: this machine has a CUDA device, which --device cuda uses"]


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("device", ["cuda:1", "mps", "gpu", "", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InvalidSetting, match="device"):
        settled_device(device)


def test_without_a_gpu_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert settled_device(None) == "cpu"
    assert not caplog.messages
