from __future__ import annotations

from pathlib import Path

import pytest

from corolla.server.embedded import fast_dtype
from corolla.server.settings import ServeConfig, settle_terms
from corolla.swarm.records import ANNOUNCE_EVERY
from tests.models import tiny


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_every_cuda_device_computes_bfloat16(device: str) -> None:
    assert fast_dtype(device) == "bfloat16"


def test_the_cpu_is_the_default_device(tmp_path: Path) -> None:
    terms = settle_terms(tiny.save("llama", tmp_path), ServeConfig(dtype="float32"))
    assert (terms.offer.device, terms.hidden, terms.blocks) == ("cpu", 64, 4)


def test_a_record_lives_three_announcements() -> None:
    assert ServeConfig().lifetime == 3 * ANNOUNCE_EVERY == 3 * ServeConfig().announce_every
