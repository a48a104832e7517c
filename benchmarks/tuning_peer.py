"""One client that tunes a prompt, behind a pipe: through Corolla's servers, through Petals', or with PEFT in one process.

    python benchmarks/tuning_peer.py corolla THREADS DIRECTORY ADDRESS DTYPE
    python benchmarks/tuning_peer.py peft THREADS DIRECTORY DTYPE
    PYTHON benchmarks/tuning_peer.py petals THREADS DIRECTORY ADDRESS DHT_PREFIX

One JSON request a line, one JSON answer a line. {"steps": n, "batch": s, "length": t} gives {"seconds": [...], "losses": [...]} of
each step, and in bytes {"resident", "mapped", "imported", "outer"}: this process's memory at its highest, what of it are pages of files
(libraries, which all processes share), its memory after its imports, and that of the embeddings and the head. All of them begin with
the same 16 soft tokens and see the same random tokens. {"prompt": [token ids],
"new_tokens": n, "beams": b} gives {"token_ids": [...], "times": [...]} of the bare model's `generate`: seconds from the request to each
token, or, with several beams, to the end. With Petals nothing of Corolla is needed.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from petals_peer import Clock

SOFT_TOKENS, SEED, LEARNING_RATE = 16, 0, 1e-2

Loss = Callable[[Any], Any]


def corolla(directory: str, address: str, dtype: str) -> tuple[Any, Any, Loss]:
    import torch

    from corolla.remote.models import AutoDistributedModelForCausalLM
    from corolla.tuning.loss import summed_loss

    model = AutoDistributedModelForCausalLM.from_pretrained(
        directory, initial_peers=[address], torch_dtype=dtype, tuning_mode="ptune", pre_seq_len=SOFT_TOKENS
    )

    def loss(ids: Any) -> Any:
        total, count = summed_loss(model, ids, torch.ones_like(ids), ids)
        return total / count

    return model, model.bare.prompts.tokens, loss


def peft(directory: str, dtype: str) -> tuple[Any, Any, Loss]:
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model: Any = get_peft_model(stock, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=SOFT_TOKENS))
    return stock, model.prompt_encoder["default"].embedding.weight, lambda ids: model(input_ids=ids, labels=ids).loss


def petals(directory: str, address: str, dht_prefix: str) -> tuple[Any, Any, Loss]:
    import petals as library
    import torch

    model = library.AutoDistributedModelForCausalLM.from_pretrained(
        directory,
        initial_peers=[address],
        dht_prefix=dht_prefix,
        torch_dtype=torch.float32,
        show_route=False,
        use_chunked_forward=False,  # else it looks for a package that only bfloat16 heads need
        tuning_mode="ptune",
        pre_seq_len=SOFT_TOKENS,
    )
    model.requires_grad_(False)
    tokens = model.transformer.prompt_embeddings.weight.requires_grad_(True)
    return model, tokens, lambda ids: model(input_ids=ids, labels=ids).loss


_LIBRARIES = {  # what is held before anything is loaded
    "corolla": ("hivemind", "corolla.remote.models", "corolla.tuning.loss"),
    "peft": ("peft", "transformers.models.bloom.modeling_bloom"),
    "petals": ("petals",),
}
_KINDS: dict[str, Callable[..., tuple[Any, Any, Loss]]] = {"corolla": corolla, "peft": peft, "petals": petals}


def main() -> None:
    what, threads, *arguments = sys.argv[1:]
    if what == "petals":
        import petals_peer

        petals_peer.prepare(int(threads))
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(int(threads))
    for library in _LIBRARIES[what]:
        importlib.import_module(library)
    imported = resident()
    model, tokens, loss_of = _KINDS[what](*arguments)
    with torch.no_grad():
        tokens.copy_(torch.randn(tokens.shape, generator=torch.Generator().manual_seed(SEED)) * 0.02)
    optimizer = torch.optim.AdamW([tokens], lr=LEARNING_RATE, weight_decay=0.0)
    ends = {
        parameter.data_ptr(): parameter.nbytes
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
        for parameter in end.parameters()
    }
    generator = torch.Generator().manual_seed(SEED)
    print(json.dumps({"ready": True}), file=pipe, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request:
            print(json.dumps(answer(model, **request)), file=pipe, flush=True)
            continue
        seconds, losses = [], []
        for _ in range(request["steps"]):
            ids = torch.randint(5, model.config.vocab_size, (request["batch"], request["length"]), generator=generator)
            began = time.perf_counter()
            loss = loss_of(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            losses.append(float(loss))
        memory = {"resident": resident(highest=True), "mapped": mapped(), "imported": imported, "outer": sum(ends.values())}
        print(json.dumps({"seconds": seconds, "losses": losses, **memory}), file=pipe, flush=True)


def answer(model: Any, prompt: list[int], new_tokens: int, beams: int) -> dict[str, Any]:
    """Of Corolla's model in a session, without the soft prompt; of another one by itself."""
    import torch

    ids, clock = torch.tensor([prompt]), Clock()
    settings: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    if beams == 1:
        settings["streamer"] = clock
    began = time.perf_counter()
    if hasattr(model, "inference_session"):
        prompts, model.bare.prompts = model.bare.prompts, None
        try:
            with model.inference_session() as session:
                said = model.generate(ids, session=session, **settings)[0]
        finally:
            model.bare.prompts = prompts
    else:
        said = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0]
    return {"token_ids": said.tolist()[-new_tokens:], "times": clock.times or [time.perf_counter() - began]}


def resident(*, highest: bool = False) -> int:
    """Bytes of this process in memory, now or at most so far."""
    if highest and (own := from_status("VmHWM")):
        return own
    if highest:  # which on Linux would count what this process was forked from, too
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    import psutil

    return int(psutil.Process().memory_info().rss)


def mapped() -> int:
    """Bytes of files that are in memory for this process, now; 0 where the system does not tell."""
    return from_status("RssFile")


def from_status(name: str) -> int:
    """A figure of Linux's /proc/self/status in bytes; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
