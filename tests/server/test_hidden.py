"""Sessions on hidden states: a client that keeps the embeddings and the head sends rows in and gets the last block's rows back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from corolla.engine.engine import Engine, EngineConfig
from corolla.messages import FailedFrame, ForwardFrame, Gap, HiddenFrame, Hop, ResultFrame, StepFrame, WireMessage
from corolla.models.reference import Reference
from corolla.models.span import load_span
from corolla.server.node import SpanServer
from corolla.server.session_table import SpanServerConfig
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.network import LocalHub, LocalNetwork
from corolla.types import Span
from tests.models import tiny

TOKENS = [5 + i * 11 % 180 for i in range(70)]
ROUTE = (Hop("a", 0, 1), Hop("b", 1, 4))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, hidden] that enter the first block and that leave the last one, before the final norm."""
    inner = Reference(directory).model.model
    seen: list[torch.Tensor] = []
    inner.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        inner(torch.tensor([TOKENS]))
        return inner.embed_tokens(torch.tensor(TOKENS)), seen[0]


class Client:
    def __init__(self, network: LocalNetwork) -> None:
        self.network = network
        self.inbox: SimpleQueue[WireMessage] = SimpleQueue()
        network.listen(lambda _, message: self.inbox.put(message), lambda _: None)

    def step(self, start: int, rows: torch.Tensor, generation: int = 1) -> torch.Tensor | WireMessage:
        """The rows that come out, or what came in their place."""
        self.network.send("a", StepFrame("s", generation, start, (), to_array(rows, "float32"), route=ROUTE, output="hidden"))
        pieces: list[torch.Tensor] = []
        while sum(len(piece) for piece in pieces) < len(rows):
            message = self.inbox.get(timeout=20)
            if not isinstance(message, HiddenFrame):
                return message
            pieces.append(from_array(message.hidden))
        return torch.cat(pieces)


@pytest.fixture
def client(directory: Path) -> Iterator[Client]:
    hub, servers = LocalHub(), []
    for name, start, end in (("a", 0, 1), ("b", 1, 4)):
        engine = Engine(load_span(directory, Span(start, end), dtype="float32"), EngineConfig(cache_tokens=512, page_size=16, step_rows=32))
        engine.start()
        servers.append(SpanServer(engine, hub.join(name), SpanServerConfig(wire_dtype="float32")))
    yield Client(hub.join("client"))
    for server in servers:
        server.close()


def test_rows_come_out_as_from_the_stock_model(client: Client, reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    entering, leaving = reference
    pieces = [client.step(0, entering[:40]), client.step(40, entering[40:41], 2), client.step(41, entering[41:], 3)]
    torch.testing.assert_close(torch.cat(pieces), leaving, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_going_back_and_on_is_the_rule_of_positions(client: Client, reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    entering, leaving = reference
    client.step(0, entering)
    again = client.step(30, entering[30:35], 2)
    torch.testing.assert_close(again, leaving[30:35], rtol=1e-4, atol=1e-5)
    answer = client.step(50, entering[50:], 3)
    assert isinstance(answer, Gap)
    assert answer.have == 35


def test_rows_of_a_wrong_width_are_the_callers_mistake(client: Client) -> None:
    answer = client.step(0, torch.zeros(3, 7))
    assert isinstance(answer, FailedFrame)
    assert answer.kind == "InvalidSetting"


def test_rows_that_are_not_finite_are_refused(client: Client) -> None:
    answer = client.step(0, torch.full((3, 64), float("nan")))
    assert isinstance(answer, FailedFrame)
    assert answer.kind == "InvalidSetting"


def test_a_forward_without_a_session_gives_the_same_rows(client: Client, reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    entering, _ = reference
    first = client.step(0, entering)
    client.network.send("a", ForwardFrame(7, 0, 1, (len(TOKENS),), to_array(entering, "float32")))
    result = client.inbox.get(timeout=20)
    assert isinstance(result, ResultFrame)
    client.network.send("b", ForwardFrame(8, 1, 4, (len(TOKENS),), result.hidden))
    result = client.inbox.get(timeout=20)
    assert isinstance(result, ResultFrame)
    torch.testing.assert_close(from_array(result.hidden), first, rtol=1e-4, atol=1e-5)
