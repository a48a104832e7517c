"""The PyTorch client over real server processes and real hivemind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from corolla.remote.models import AutoDistributedModelForCausalLM
from corolla.types import Span
from tests.swarm.harness import OVER_HIVEMIND, Swarm

pytestmark = OVER_HIVEMIND
IDS = torch.tensor([[5, 16, 27, 38, 49, 60], [7, 18, 29, 40, 51, 62]])


async def joined(directory: Path, address: str, **settings: Any) -> Any:
    # While an event loop runs, or hivemind makes one and leaves it open.
    return AutoDistributedModelForCausalLM.from_pretrained(directory, initial_peers=[address], torch_dtype="float32", **settings)


def test_training_and_generating_go_on_when_servers_die(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = checkpoints["bloom"]
    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with Swarm(directory, tmp_path, "--dtype", "float32") as swarm:
        swarm.serve("0:2", "2:4", "2:4", "1:4")
        swarm.wait_ready()
        model = asyncio.run(joined(directory, swarm.address))
        servers = model.bare.blocks.calls.servers

        embeddings = model.get_input_embeddings()(IDS)
        expected = stock(inputs_embeds=(theirs := embeddings.clone().requires_grad_()), labels=IDS)
        expected.loss.backward()
        for before_the_forward in (False, True):
            last = swarm.of(servers.hops(Span(3, 4))[0].peer)
            ours = embeddings.clone().requires_grad_()
            if before_the_forward:
                last.kill()
            out = model(inputs_embeds=ours, labels=IDS)
            last.kill()
            out.loss.backward()
            torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
        with model.inference_session() as session:
            answer = model.generate(IDS, session=session, max_new_tokens=5, do_sample=False)
        assert torch.equal(answer, stock.generate(IDS, max_new_tokens=5, do_sample=False))
        model.close()
