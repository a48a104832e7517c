"""LoRA adapters as PEFT saves them, with factors large enough that logits differ clearly."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def save(base: Path, directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """A random adapter for the model in `base`; `options` are PEFT's, by default those of `corolla finetune --lora`."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    with _old_names():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.12, generator=generator)
    model.save_pretrained(directory)
    return directory


@contextmanager
def _old_names() -> Iterator[None]:
    """PEFT asks transformers by a name that is deprecated there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def change(directory: Path, **settings: Any) -> None:
    """Other values in the adapter's configuration."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


class Adapted:
    """PEFT's own model: `PeftModel` over the stock one."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        with _old_names():
            self.model = (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary]."""
        return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def greedy(self, tokens: list[int], count: int, prompt: torch.Tensor | None = None) -> list[int]:
        """The `count` most likely tokens, with the rows [P, hidden] of a soft prompt in front of the embeddings."""
        embeddings, history = self.model.get_input_embeddings(), list(tokens)
        for _ in range(count):
            with torch.inference_mode():
                rows = embeddings(torch.tensor(history))
                rows = rows if prompt is None else torch.cat([prompt, rows])
                history.append(int(self.model(inputs_embeds=rows[None], use_cache=False).logits[0, -1].argmax()))
        return history[len(tokens) :]
