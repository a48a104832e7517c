"""Petals under an interpreter that has it (make_petals_peer.sh): a server, or a client behind a pipe.

    PYTHON benchmarks/petals_peer.py --version
    PYTHON benchmarks/petals_peer.py server THREADS ARGUMENTS-OF-petals.cli.run_server...
    PYTHON benchmarks/petals_peer.py client THREADS DIRECTORY ADDRESS DHT_PREFIX

The client takes one JSON request a line and gives one JSON answer a line: {"prompts": [[token ids]], "new_tokens": n} with
one prompt, and {"answers": [{"token_ids": [...], "times": [...]}]}, seconds from the request to each token, chosen greedily.
Needs nothing of Corolla.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any


def prepare(threads: int) -> None:
    """What has to be done before hivemind and Petals are imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["HF_HUB_OFFLINE"] = "1"

    # The collector ends tasks that only an event loop refers to, for it does so weakly: with it, one of 8 sessions hung for good
    # within a few requests in five runs of seven; without it none did in 20 requests, at the same speed.
    gc.disable()

    # hivemind takes these names from where torch had them in 2023.
    import torch.amp.grad_scaler
    import torch.cuda.amp.grad_scaler

    for name in ("_refresh_per_optimizer_state", "OptState"):
        setattr(torch.cuda.amp.grad_scaler, name, getattr(torch.amp.grad_scaler, name))


def serve(arguments: list[str]) -> None:
    from petals.cli import run_server

    sys.argv = ["run_server", *arguments]
    run_server.main()


class Client:
    def __init__(self, directory: str, address: str, dht_prefix: str) -> None:
        import petals
        import torch

        self._tensor = torch.tensor
        self._model = petals.AutoDistributedModelForCausalLM.from_pretrained(
            directory,
            initial_peers=[address],
            dht_prefix=dht_prefix,
            torch_dtype=torch.float32,
            show_route=False,
            use_chunked_forward=False,  # else it looks for a package that only bfloat16 heads need
        )
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def answer(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        clock = Clock()
        self._model.generate(self._tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, streamer=clock)
        return {"token_ids": clock.token_ids, "times": clock.times}


class Clock:
    """A streamer of transformers that notes when tokens come; what it is given first is the prompt."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self._began = time.perf_counter()
        self._prompt_came = False

    def put(self, value: Any) -> None:
        if self._prompt_came:
            self.times.append(time.perf_counter() - self._began)
            self.token_ids.append(int(value))
        self._prompt_came = True

    def end(self) -> None:
        pass


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        prepare(1)
        import petals

        print(petals.__version__)
        return
    what, threads, *arguments = sys.argv[1:]
    prepare(int(threads))
    if what == "server":
        serve(arguments)
        return
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    client = Client(*arguments)
    print(json.dumps({"ready": True}), file=pipe, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        (prompt,) = request["prompts"]
        print(json.dumps({"answers": [client.answer(prompt, request["new_tokens"])]}), file=pipe, flush=True)


if __name__ == "__main__":
    main()
