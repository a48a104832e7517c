"""The PyTorch client over real server processes and real hivemind: as exact as one process, whatever the route, and when servers die."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.remote.models import AutoDistributedModelForCausalLM
from corolla.remote.prompts import soft_prompts
from corolla.types import Span
from tests.remote.stock import IDS, MASK, P, assert_step_equal, stock
from tests.swarm.harness import OVER_HIVEMIND, Swarm

pytestmark = OVER_HIVEMIND
LABELS = IDS.masked_fill(MASK == 0, -100)
ROUTES = (("0:4",), ("0:2", "2:4"), ("0:2", "2:3", "3:4"), ("0:1", "1:2", "2:3", "3:4"))


class Joined:
    """A swarm of one model's servers, one or more for each span of `ROUTES`, and a distributed model over it."""

    def __init__(self, directory: Path, folder: Path) -> None:
        self.reference = stock(directory)
        with ExitStack() as stack:
            self.swarm = stack.enter_context(Swarm(directory, folder, "--dtype", "float32"))
            self.swarm.serve(*dict.fromkeys(span for route in ROUTES for span in route))
            self.swarm.wait_ready()
            self.model = asyncio.run(self._join(directory))
            stack.callback(self.model.close)
            self.close = stack.pop_all().close
        self.servers = self.model.bare.blocks.calls.servers

    async def _join(self, directory: Path) -> Any:
        # While an event loop runs, or hivemind makes one and leaves it open.
        return AutoDistributedModelForCausalLM.from_pretrained(directory, initial_peers=[self.swarm.address], torch_dtype="float32")

    def take(self, route: tuple[str, ...] | None) -> None:
        """Use the servers of these spans only; all of them without."""
        peers = None if route is None else frozenset(server.peer for server in self.swarm.servers if server.blocks in route)
        self.servers.config = replace(self.servers.config, allowed_servers=peers)

    def prompt(self, mode: Any) -> None:
        """A new soft prompt, the same each time."""
        torch.manual_seed(4)
        self.model.bare.prompts = None
        if mode is not None:
            self.model.bare.prompts = soft_prompts(mode, P, self.reference.get_input_embeddings().weight, 4)


@pytest.fixture(scope="module", params=["llama", "bloom"])
def joined(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Joined]:
    made = Joined(checkpoints[request.param], tmp_path_factory.mktemp("swarm"))
    yield made
    made.close()


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_logits_and_gradients_are_those_of_one_process(joined: Joined, route: tuple[str, ...], mode: str) -> None:
    joined.take(route)
    joined.prompt(mode)
    assert_step_equal(joined.model, joined.reference, mode)
    assert len(joined.servers.hops(Span(0, 4))) == len(route)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"])
def test_answers_are_transformers(joined: Joined, settings: dict[str, Any], padded: bool) -> None:
    joined.take(ROUTES[1])
    joined.prompt(None)
    given = {"inputs": IDS.flip(1), "attention_mask": MASK.flip(1)} if padded else {"inputs": IDS[:1]}
    answers = []
    for model in (joined.model, joined.reference):
        torch.manual_seed(3)
        answers.append(model.generate(**given, max_new_tokens=8, **settings))
    assert torch.equal(*answers)


@pytest.mark.parametrize("mode", [None, "deep_ptune"])
def test_five_turns_are_one_long_input(joined: Joined, mode: str | None) -> None:
    joined.take(ROUTES[2])
    joined.prompt(mode)
    if mode is not None:
        torch.nn.init.normal_(joined.model.bare.prompts.deep)
    turns = torch.randint(3, 199, (5, 1, 7))
    with joined.model.inference_session() as session:
        for turn in turns:
            joined.model.generate(turn, session=session, max_new_tokens=4, do_sample=False)
        said = session.output_ids
        logits = joined.model(said).logits
        answers = logits[0, :-1].argmax(-1)
        for end in range(11, 56, 11):
            assert torch.equal(answers[end - 5 : end - 1], said[0, end - 4 : end])
    if mode is None:
        torch.testing.assert_close(logits, joined.reference(said).logits, rtol=1e-5, atol=1e-5)


def curve(joined: Joined, kill_in: dict[int, str]) -> list[float]:
    """The losses of a few steps; in some of them a server of the route is killed, before the forward or before the backward."""
    joined.prompt("deep_ptune")
    optimizer = torch.optim.AdamW([p for p in joined.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for number in range(5):
        last = joined.servers.hops(Span(0, 4))[-1].peer
        if kill_in.get(number) == "forward":
            joined.swarm.of(last).kill()
        loss = joined.model(IDS, attention_mask=MASK, labels=LABELS).loss
        if kill_in.get(number) == "backward":
            joined.swarm.of(last).kill()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_loss_curve_does_not_show_that_servers_died(joined: Joined) -> None:
    """The last test of its swarm: two of the servers are dead after it."""
    joined.take(None)
    undisturbed = curve(joined, {})
    assert undisturbed[-1] < undisturbed[0]
    assert curve(joined, {1: "forward", 3: "backward"}) == pytest.approx(undisturbed, abs=1e-5)
    assert len(joined.servers.bans.banned()) >= 1
    joined.prompt(None)
    assert torch.equal(*(model.generate(IDS[:1], max_new_tokens=5, do_sample=False) for model in (joined.model, joined.reference)))
