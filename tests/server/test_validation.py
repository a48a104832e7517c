"""What is looked for in the rows of a step."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import psutil
import pytest
import torch

from corolla.errors import InvalidSetting, ServerFault
from corolla.messages import Hop, StepFrame, WireDtype
from corolla.models.checkpoint import read_config
from corolla.models.config import ModelConfig
from corolla.models.families import architecture
from corolla.server.session_table import SessionRoute
from corolla.server.validation import check_rows
from corolla.swarm.arrays import from_array, to_array
from corolla.types import Step
from tests.models import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTE = (Hop("a", 0, 2), Hop("b", 2, 4))


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return architecture(read_config(tiny.save("llama", tmp_path_factory.mktemp("llama"))))


def check(arch: ModelConfig, rows: torch.Tensor, hop: int = 1) -> None:
    """Of a server's rows, or (at hop 0) of a client's."""
    sender = "client" if hop == 0 else "a"
    frame = StepFrame("s", 0, 0, (5,), route=ROUTE, hop=hop, client="client")
    check_rows(arch, sender, frame, Step("s", 0, rows, tokens=(5,)), SessionRoute.of(sender, frame))


def rows_with(value: float, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(5, 64).to(dtype)
    rows[3, 17] = value
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_rows_pass_up_to_the_largest_magnitude(arch: ModelConfig, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for value in (largest, -largest, 0.0, -0.0, torch.finfo(dtype).tiny):
        check(arch, rows_with(value, dtype))
    check(arch, torch.full((5, 64), largest, dtype=dtype))  # though their sum is infinite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_servers_fault_and_a_clients_mistake(arch: ModelConfig, dtype: torch.dtype, value: float) -> None:
    with pytest.raises(ServerFault, match="NaN or infinite"):
        check(arch, rows_with(value, dtype))
    with pytest.raises(InvalidSetting, match="NaN or infinite"):
        check(arch, rows_with(value, dtype), hop=0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16", "q8"])
def test_a_long_prompts_rows_start_no_team_on_the_networks_thread(arch: ModelConfig, wire_dtype: WireDtype) -> None:
    """See `engine.threads`. `torch.ones(...).sum()`, so large, would."""
    array = to_array(torch.randn(1000, 1024), wire_dtype)
    counts: list[int] = []

    def receive() -> None:
        counts.append(psutil.Process().num_threads())
        check(arch, from_array(array))
        counts.append(psutil.Process().num_threads())
        torch.ones(1000, 1024).exp()
        counts.append(psutil.Process().num_threads())

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join()
    before, after, with_team = counts
    assert after == before
    assert with_team > before, "nothing starts a team here, so nothing is shown"
